"""How fast rows are read, warm and cold, and where the time of kdcli's reader goes."""

from __future__ import annotations

import cProfile
import mmap
import os
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import CDLL, c_size_t, c_ubyte, c_void_p, get_errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from stores_formats import DenseRows, Row

from kdcli.store.arrays import ENTRY_COUNT
from kdcli.store.batch_buffers import collate_rows
from kdcli.store.reader import StoreReader
from kdcli.store.schema import StoreSchema
from kdcli.structures import Entries, RowKey
from kdcli.tensors import Need, Tensors

TURN_S = 0.15  # of processor time: a turn reads all rows again and again for so long, a pass of 30 ms is mostly noise
COLD_ROUNDS = 3
PROFILE_PASSES, DEAREST = 5, 12
RATES = ("ready", "ready_cpu", "joined", "joined_cpu")

Read = Callable[[Sequence[RowKey]], list[Any]]  # a batch of what ``join`` takes, with ``entries``


@dataclass(frozen=True)
class Reading:
    """One way to read rows: ``open`` makes a fresh reader; ``schema`` decodes what it gives. ``folder``: its files."""

    open: Callable[[], Read]
    schema: StoreSchema
    layout: Sequence[Any]
    needs: tuple[Need, ...]
    folder: Path

    def ready(self, read: Read, keys: Sequence[RowKey], device: torch.device) -> tuple[Tensors, Any, Any]:
        """Tensors of a batch on the training device, as a loss reads them; time (see now) of reading and joining the
        rows, and of copying and decoding them there."""
        began = now()
        rows = read(keys)
        arrays = collate_rows(rows, self.layout)
        entries = None if rows[0].entries is None else Entries.collate([r.entries for r in rows])
        joined = now()
        there = None if entries is None else entries.to(device)
        tensors = self.schema.decode({k: v.to(device) for k, v in arrays.items()}, self.needs, there)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return tensors, joined - began, now() - joined


def now() -> NDArray[np.float64]:
    """Seconds of the clock, and of this process's processor time: where others share the cores, only the latter compares."""
    return np.array([time.perf_counter(), time.process_time()])


def by_kdcli(store: Path, needs: tuple[Need, ...]) -> Reading:
    """The store through kdcli's reader."""
    reader = StoreReader(store, needs)
    return Reading(
        lambda: StoreReader(store, needs).read_all, reader.schema, tuple(reader.layout.values()), needs, store
    )  # fmt: skip


def by_zarr(store: Path, needs: tuple[Need, ...]) -> Reading:
    """The same arrays of the same store through zarr-python, each opened once."""
    reader = StoreReader(store, needs)
    schema, layout = reader.schema, reader.layout

    def fresh() -> Read:
        group = zarr.open_group(store, mode="r")
        opened: dict[str, Any] = {path: group[path] for path in layout}

        def read(key: RowKey) -> Row:
            index = reader.row_index(key)
            values = {path: np.asarray(array[index]) for path, array in opened.items()}
            entries: Entries | None = None
            if schema.sparse:
                index_, flag, gt, weight = (
                    torch.from_numpy(values[f"entries/{n}"][: int(values[ENTRY_COUNT][0])])
                    for n in ("index", "flag", "gt", "weight")
                )
                entries = Entries(index_.long(), flag, gt.long(), weight, torch.zeros_like(index_, dtype=torch.int64))
            arrays = {}
            for tensor in reader.tensors:
                real = (
                    int(entries.select(tensor.need.region).sum())
                    if entries is not None and tensor.need.at_entries
                    else None
                )
                for spec in schema.tensor_arrays(tensor).values():
                    arrays[spec.path] = values[spec.path][:real]
            return Row(arrays, entries)

        return lambda keys: [read(key) for key in keys]

    return Reading(fresh, schema, tuple(layout.values()), needs, store)


def by_format(
    kind: str, folder: Path, schema: StoreSchema, numbers: Mapping[RowKey, int],
    entries: Mapping[RowKey, Entries | None], needs: tuple[Need, ...],
) -> Reading:  # fmt: skip
    """Dense files. Where the sparse tensors are is in memory already; a training loader computes it."""

    def fresh() -> Read:
        rows = DenseRows(kind, folder, schema, numbers)
        return lambda keys: [rows.read(key, entries[key]) for key in keys]

    return Reading(fresh, schema, tuple(DenseRows(kind, folder, schema, numbers).layout.values()), needs, folder)


@contextmanager
def one_thread() -> Iterator[None]:
    """As a data worker has: a second one would only add to the processor time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def warm(
    readings: Mapping[str, Reading], keys: Sequence[RowKey], batch: int, rounds: int, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    """Rows/s of each reading in each round, in turns: ``ready`` for the loss, ``joined`` only, as in a data worker, and
    both by processor time (``_cpu``)."""
    opened = {name: reading.open() for name, reading in readings.items()}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in readings}
    names = list(readings)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            joined = decoded = np.zeros(2)
            rows = 0
            while (joined + decoded)[1] < TURN_S:
                for group in _batches(keys, batch, seed=turn):
                    _, first, second = readings[name].ready(opened[name], group, device)
                    joined, decoded, rows = joined + first, decoded + second, rows + len(group)
            rates = dict(zip(RATES, [*(rows / (joined + decoded)), *(rows / joined)], strict=True))
            if turn:  # the first one warms the page cache up
                for rate, value in rates.items():
                    found[name].setdefault(rate, []).append(float(value))
    return found


@one_thread()
def cold(
    readings: Mapping[str, Reading], keys: Sequence[RowKey], batch: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Rows/s with no page of the files in memory, opening included; ``resident``: the share that stayed there."""
    seconds: dict[str, list[float]] = {name: [] for name in readings}
    resident = dict.fromkeys(readings, 0.0)
    for turn in range(COLD_ROUNDS):
        for name, reading in readings.items():
            resident[name] = max(resident[name], drop(reading.folder))
            began = time.perf_counter()
            read = reading.open()
            for group in _batches(keys, batch, seed=turn):
                reading.ready(read, group, device)
            seconds[name].append(time.perf_counter() - began)
    return {n: {"rows_per_s": len(keys) / statistics.median(s), "resident": resident[n]} for n, s in seconds.items()}


def drop(folder: Path) -> float:
    """Put every file of ``folder`` on the disk and its pages out of memory; the share of pages that are there still."""
    kept = total = 0
    for file in _files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        found = _resident_pages(descriptor, file.stat().st_size)
        kept, total = kept + int(found.sum()), total + len(found)
        os.close(descriptor)
    return kept / max(1, total)


def bytes_of(folder: Path) -> int:
    """Bytes of all files of ``folder``."""
    return sum(f.stat().st_size for f in _files(folder))


def synced(folder: Path) -> None:
    """Wait until every file of ``folder`` is on the disk."""
    for file in _files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@one_thread()
def profile(reading: Reading, keys: Sequence[RowKey], batch: int, device: torch.device) -> dict[str, Any]:
    """Where the processor time of a warm read goes: microseconds and calls a row, by kind, and the dearest functions.

    The profiler's own time falls on ``python``: about half a microsecond a call.
    """
    read = reading.open()
    watch = cProfile.Profile(time.process_time)
    for turn in range(PROFILE_PASSES + 1):
        if turn:  # the first pass opens the files
            watch.enable()
        for group in _batches(keys, batch, seed=turn):
            reading.ready(read, group, device)
    watch.disable()
    rows = PROFILE_PASSES * len(keys)
    own: dict[str, float] = {}
    calls: dict[str, float] = {}
    dearest = []
    for (file, line, name), (_, count, seconds, _, _) in pstats.Stats(watch).stats.items():  # type: ignore[attr-defined]
        kinds = {"pread": "pread", "crc32c": "crc32c", "zst": "zstd", "torch": "torch", "Tensor": "torch"}
        kind = "python"
        if file == "~":  # not Python
            kind = next((k for part, k in kinds.items() if part in name), "other C")
        own[kind] = own.get(kind, 0.0) + 1e6 * seconds / rows
        calls[kind] = calls.get(kind, 0.0) + count / rows
        where = name if file == "~" else f"{Path(file).name}:{line} {name}"
        dearest.append((1e6 * seconds / rows, count / rows, where))
    listed = [
        f"{us:.1f} us in {count:.1f} calls of {where}" for us, count, where in sorted(dearest)[: -DEAREST - 1 : -1]
    ]
    return {"us_a_row": own, "calls_a_row": calls, "dearest": listed}


def _batches(keys: Sequence[RowKey], batch: int, seed: int) -> list[list[RowKey]]:
    order = np.random.default_rng(seed).permutation(len(keys))
    return [[keys[k] for k in order[start : start + batch]] for start in range(0, len(keys), batch)]


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def _resident_pages(descriptor: int, size: int) -> Any:
    """A boolean for each page of a file: whether it is in memory."""
    if not size:
        return np.zeros(0, bool)
    library = CDLL(None, use_errno=True)
    library.mincore.argtypes = [c_void_p, c_size_t, c_void_p]
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) as view:
        pages = (c_ubyte * (-(-size // mmap.PAGESIZE)))()
        address = np.frombuffer(view, np.uint8).ctypes.data
        if library.mincore(address, size, pages):
            raise OSError(get_errno(), "mincore")
        return np.frombuffer(memoryview(pages), np.uint8) & 1
