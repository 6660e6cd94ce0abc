"""A short run of the writer itself: real rows into a folder on the target's disk, which is gone afterwards.

The rows are of the commoner orientation of the canvas, and evenly spaced in size, so that the smallest and the largest
are among them.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kdcli.data.coco import has_split
from kdcli.engine.caching.estimate.count import ElementCounts, element_bytes
from kdcli.engine.caching.plan import StorePlan
from kdcli.engine.caching.teacher_ap import scores
from kdcli.engine.caching.write import Load, write_store
from kdcli.engine.loading.loader import Loader
from kdcli.engine.loading.orientation import group_by_orientation
from kdcli.engine.loading.samples import Item, Sample
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.runtime.threads import usable_cores
from kdcli.store.arrays import shard_key
from kdcli.store.locks import scratch_folder
from kdcli.store.storage.base import Storage
from kdcli.store.storage.local import LocalStorage
from kdcli.store.writer import create_store

LEAST_BATCHES, MOST_BATCHES = 2, 16
SHARE = 8  # at most one in so many micro-batches of the store is run as a probe
WRITE_SECONDS = 4.0  # for the writer
ALONE_SECONDS = 1.5  # for the teacher alone
SLOW_SECONDS = 5.0  # a micro-batch: then its first pass, which starts the network up, is good enough
LOAD_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class StageTimings:
    """Seconds, measured on this machine."""

    load: float  # a row, in one data worker; without one, by all threads of this one
    load_cpu: float
    teacher: float  # a micro-batch, with nothing else running: what a live teacher would cost
    front: float  # a micro-batch, with all that goes on before and beside it
    front_cpu: float  # over all cores, encoding included, and loading if no data worker does it
    encode: float  # a row: encoding and compression, by all threads behind the teacher; 0 if they take turns with it
    start: float  # of the data workers and their first images, until the first forward pass
    drain: float  # from the last forward pass to the end
    shard: float  # writing the files of a shard, however small
    byte: float  # and each byte of them
    evaluate: float  # a micro-batch of the val split: forward and NMS; 0 without one


@dataclass(frozen=True)
class Probe:
    """What a few rows took."""

    pace: StageTimings
    chosen: tuple[int, ...]  # of the counted rows
    chunk_bytes: dict[str, int]  # by array path, of these rows
    on_target: bool  # False: the disk that was timed is not the one of the store


class _Clock(NullReporter):
    """When each micro-batch was handed on."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def advance(self, units: int = 1, info: str = "") -> None:
        if info:
            self.times.append(time.perf_counter())


def run_probe(plan: StorePlan, counts: ElementCounts, storage: Storage) -> Probe:
    """Load, run, encode and write a few micro-batches of the rows of ``counts``. Leaves nothing behind."""
    size = plan.teacher.forward.micro_batch
    sizes = _sizes(plan, counts)
    first = _load(plan, counts, [p for b in _pick(sizes, 1, size) for p in b])
    alone = _time_teacher(plan, first.samples)
    batches = min(MOST_BATCHES, -(-plan.schema.rows // size) // SHARE, int(WRITE_SECONDS / alone))
    batches = min(batches, int(LOAD_SECONDS / (size * first.wall)))
    chosen = [p for b in _pick(sizes, max(LEAST_BATCHES, batches), size) for p in b]
    loaded = _load(plan, counts, chosen)
    measured = scores(plan) and has_split(Path(plan.options.data), "val")
    evaluate = _time_evaluation(plan, first.samples) if measured else 0.0
    folder, on_target = _folder(plan, storage, len(chosen))
    with scratch_folder(folder or Path(tempfile.gettempdir()), ".kdcli-probe-") as scratch:
        return _write(plan, chosen, loaded, alone, evaluate, scratch, on_target)


def loads(plan: StorePlan) -> bool:
    """Whether loading images takes time of the teacher's: without data workers, or on cores that its threads take all of."""
    return plan.teacher.workers == 0 or (
        plan.teacher.device.type == "cpu" and torch.get_num_threads() >= usable_cores()
    )


def _sizes(plan: StorePlan, counts: ElementCounts) -> list[int]:
    """Counted rows of the commoner orientation, by their bytes before compression."""
    common = max(group_by_orientation(plan.source, counts.items).values(), key=len)
    total = np.sum([element_bytes(a) * counts.units[a.path] for a in plan.schema.layout()], axis=0)
    return sorted(common, key=lambda p: (int(total[p]), p))


def _pick(ordered: list[int], batches: int, size: int) -> list[list[int]]:
    """Micro-batches of evenly spaced ones, each with small and large."""
    count = min(batches * size, len(ordered))
    chosen = [ordered[int((k + 0.5) * len(ordered) / count)] for k in range(count)]
    batches = -(-count // size)
    return [chosen[k::batches] for k in range(batches)]


@dataclass(frozen=True)
class _Loaded:
    samples: list[Sample]
    items: tuple[Item, ...]
    wall: float  # seconds a row, when the views of an image are read together, as the writer does it
    cpu: float
    apart: float  # seconds that a row takes longer by itself, as in the probe's own store


def _from_memory(loaded: _Loaded) -> Load:
    there = dict(zip(loaded.items, loaded.samples, strict=True))
    return lambda batches: ([there[item] for item in items] for items in batches)


def _load(plan: StorePlan, counts: ElementCounts, chosen: list[int]) -> _Loaded:
    """As the writer does it: with one thread, as a data worker, or in this one."""
    items = [counts.items[p] for p in chosen]
    images = list(dict.fromkeys(position for position, _ in items))[: -(-len(items) // len(plan.views))]
    together = [(position, view) for position in images for view in plan.views]
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if plan.teacher.workers else threads)
    try:
        _, wall, cpu = _timed_load(plan, together)
        samples, single, _ = _timed_load(plan, items)
    finally:
        torch.set_num_threads(threads)
    return _Loaded(samples, tuple(items), wall, cpu, max(0.0, single - wall))


def _timed_load(plan: StorePlan, items: list[Item]) -> tuple[list[Sample], float, float]:
    """Samples, and seconds a row: of the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    samples = next(Loader(plan.source, 0).samples([items]))
    return samples, (time.perf_counter() - wall) / len(items), (time.process_time() - cpu) / len(items)


def _time_teacher(plan: StorePlan, samples: list[Sample]) -> float:
    """Seconds of a micro-batch, without the first pass, which starts the network up, unless it is slow."""
    seconds: list[float] = []
    while not seconds or (sum(seconds[1:]) < ALONE_SECONDS and seconds[0] < SLOW_SECONDS and len(seconds) < 6):
        started = time.perf_counter()
        plan.teacher.rows(samples, plan.needs)
        seconds.append(time.perf_counter() - started)
    return float(np.mean(seconds[1:] or seconds))


def _time_evaluation(plan: StorePlan, samples: list[Sample]) -> float:
    """Seconds of a micro-batch when the teacher's AP is measured."""
    images = torch.stack([s.image for s in samples]).to(plan.teacher.device)
    content = torch.tensor([s.geometry.content for s in samples], device=plan.teacher.device)
    seconds = []
    for _ in range(2):  # NMS starts up too
        started = time.perf_counter()
        found = plan.teacher.forward.detector.decode(
            plan.teacher.forward.outputs(images), content, samples[0].geometry.canvas
        )
        torch.cat([d.boxes for d in found]).cpu()  # a GPU has finished then
        seconds.append(time.perf_counter() - started)
    return seconds[-1]


def _folder(plan: StorePlan, storage: Storage, rows: int) -> tuple[Path | None, bool]:
    """The folder that the store will be in, if it can be written to; else None, and False: the system's own."""
    if storage.folder is not None:
        parent = storage.folder.absolute().parent
        room = 4 * rows * sum(a.row_bytes for a in plan.schema.layout())
        free = storage.free_bytes()
        if parent.is_dir() and os.access(parent, os.W_OK) and (free is None or free > room):
            return parent, True
    return None, False


def _write(
    plan: StorePlan, chosen: list[int], loaded: _Loaded, alone: float, evaluate: float, scratch: Path, on_target: bool
) -> Probe:
    rows, size = len(chosen), plan.teacher.forward.micro_batch
    schema = replace(plan.schema, rows=rows, shard_rows=rows)
    ungated = replace(plan.options, min_teacher_ap=0.0)  # the probe's own store has no AP
    few = replace(plan.with_schema(schema), chosen=loaded.items, options=ungated)
    load: Load | None = None
    if not loads(plan):
        # nothing to wait for, and no data workers to end, which would be counted as encoding
        load = _from_memory(loaded)
        few = replace(few, teacher=replace(plan.teacher, workers=0))
    out = scratch / "store"
    create_store(out, few.manifest, plan.source.dataset.annotations.image_ids[:0])
    clock = _Clock()
    started, cpu = time.perf_counter(), time.process_time()
    write_store(few, out, clock, load=load)
    ended, cpu = time.perf_counter(), time.process_time() - cpu
    files = {a.path: out / shard_key(a, 0) for a in schema.layout()}
    shard, byte = _time_disk(plan, {path: file.read_bytes() for path, file in files.items()}, scratch)
    written = sum(file.stat().st_size for file in files.values())
    batches, times = len(clock.times), clock.times
    assert batches == -(-rows // size)
    front = (times[-1] - times[0]) / (batches - 1) if batches > 1 else alone
    if loads(plan):
        front = max(alone, front - size * loaded.apart)
    pace = StageTimings(
        load=loaded.wall, load_cpu=loaded.cpu, teacher=alone, front=front,
        front_cpu=cpu / batches - (size * loaded.apart if plan.teacher.workers == 0 else 0.0),
        start=max(size * loaded.wall if plan.teacher.workers else 0.0, times[0] - started - front),
        # the first micro-batch is encoded from here on, the last one until the end
        encode=0.0 if plan.teacher.interleaved else max(0.0, ended - times[0] - shard - written * byte) / rows,
        drain=ended - times[-1], shard=shard, byte=byte, evaluate=evaluate,
    )  # fmt: skip
    # a shard file ends in 16 bytes for each row and a checksum of 4
    chunks = {path: file.stat().st_size - 16 * rows - 4 for path, file in files.items()}
    return Probe(pace, tuple(chosen), chunks, on_target)


def _time_disk(plan: StorePlan, files: dict[str, bytes], scratch: Path) -> tuple[float, float]:
    """Seconds to write the files of a shard, and seconds a byte of them, synced."""
    disk = LocalStorage(scratch / "disk")
    seconds = []
    for shard, part in enumerate((1, 1, None)):  # the first makes the folders of the arrays
        started = time.perf_counter()
        for array in plan.schema.layout():
            disk.write(shard_key(array, shard), files[array.path][:part])
        disk.write(f"journal/{shard}", b"{}")
        seconds.append(time.perf_counter() - started)
    return seconds[1], max(0.0, seconds[2] - seconds[1]) / sum(map(len, files.values()))
