"""Fills a store: the teacher's forward passes here, encoding, compression and the disk in threads behind it.

Rows are computed shard by shard; inside a shard they are grouped by orientation and cut into micro-batches of a
recorded size, so that a row's numbers do not depend on where a killed run was taken up again, nor on how many processes
share the work.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcli.cache.editing import record_errors
from kdcli.cache.fidelity import ErrorMeter
from kdcli.cache.locks import hold_file, hold_store
from kdcli.cache.places import Folder, Place, Where, place_of
from kdcli.cache.reader import compare_manifests
from kdcli.cache.schema import collate as collate_rows
from kdcli.cache.schema import row_tensor
from kdcli.cache.shards import pack_chunk
from kdcli.cache.writer import StoreWriter, create_store, read_manifest
from kdcli.detectors.read import AT_PROPOSALS
from kdcli.engine.caching import Plan, encode_row, measure_teacher, require_able, teacher_rows
from kdcli.engine.loader import Loader
from kdcli.engine.samples import Item, Sample, orientation
from kdcli.engine.watch import Watcher
from kdcli.errors import StoreError

MANIFEST_IDENTITY = (
    "teacher",
    "teacher_run",
    "dataset",
    "class_order",
    "canvas",
    "views",
    "view_seed",
    "assigner",
    "regions",
)
MAX_THREADS = 4  # behind the teacher; one encodes and compresses about 60 rows/s of PFI's dense tensors at 256x320
AHEAD = 3  # micro-batches a thread that may wait for it: the bound on memory, and the teacher stops for more


@dataclass(frozen=True)
class Part:
    """The share of one of several processes: shards ``index``, ``index + count``, ..."""

    index: int = 0
    count: int = 1

    def shards(self, num_shards: int) -> range:
        """The shards of this part."""
        return range(self.index, num_shards, self.count)


@dataclass(frozen=True)
class Packed:
    """A micro-batch, encoded: chunks by array path of each of its items, raw bytes, and the errors of the encodings."""

    chunks: dict[Item, dict[str, bytes]]
    raw: int
    encoding: dict[str, dict[str, float]]
    precision: dict[str, dict[str, float]]


def write_store(plan: Plan, out: Where, watcher: Watcher, part: Part | None = None) -> int:
    """Write what is missing of the store at ``out``; returns how many rows were written in this call.

    With a ``part``, only the shards of that part: other processes may write the others at the same time. An existing
    store is continued if it is the same one, else StoreError lists the fields that differ; also when another process is
    writing all of it.
    """
    place = place_of(out)
    if not isinstance(place, Folder):  # no locks there: each process tries to make it, and one does
        if not place.exists():
            with suppress(FileExistsError):
                _create(plan, place, watcher)
        require_same(plan, place)
        return _write_part(plan, place, part or Part(), watcher)
    path = place.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold_file(path.with_name(f".{path.name}.lock")):  # the others wait for the one that makes it
        if not place.exists():
            _create(plan, place, watcher)
    require_same(plan, place)
    with hold_store(path, shared=part is not None):
        return _write_part(plan, place, part or Part(), watcher)


def _create(plan: Plan, out: Place, watcher: Watcher) -> None:
    manifest = {**plan.manifest, "teacher": {**plan.manifest["teacher"], "ap": measure_teacher(plan, watcher)}}
    create_store(out, plan.schema, manifest, plan.source.dataset.annotations.image_ids[plan.positions])


def require_same(plan: Plan, out: Place) -> None:
    """Raises StoreError when the store at ``out`` is not the one of ``plan``, GateError when its teacher is too weak."""
    stored = read_manifest(out)
    ours = {k: plan.manifest[k] for k in MANIFEST_IDENTITY} | {
        "schema": _by_name({"images": None, **plan.schema.to_json()})
    }
    stored["schema"] = _by_name(stored["schema"])
    ours["teacher"] = {k: v for k, v in ours["teacher"].items() if k != "ap"}
    differences = compare_manifests(ours, stored)
    if differences:
        raise StoreError(
            f"'{out}' is another store: {'; '.join(differences)}; choose another --out, or delete it first"
        )
    require_able(stored["teacher"]["ap"], plan.options.min_teacher_ap)


def _write_part(plan: Plan, out: Place, part: Part, watcher: Watcher) -> int:
    rows = _write_shards(plan, out, part, watcher)
    record_errors(out)  # by the part that comes last; and by a run that was killed between the last shard and this
    return rows


def _write_shards(plan: Plan, out: Place, part: Part, watcher: Watcher) -> int:
    writer = StoreWriter(out, plan.schema)
    done, mine = writer.done(), part.shards(plan.schema.num_shards)
    ranges = {s: plan.schema.shard_range(s) for s in mine}
    todo = [s for s in mine if s not in done]
    watcher.stage("cache-teacher", sum(stop - start for start, stop in ranges.values()))
    watcher.advance(sum(ranges[s][1] - ranges[s][0] for s in mine if s in done))
    chunks = {s: _micro_batches(plan, *ranges[s]) for s in todo}
    samples = Loader(plan.source, plan.workers).samples([c for s in todo for c in chunks[s]])
    threads = min(MAX_THREADS, max(1, (os.cpu_count() or 2) // 2))
    torch_threads = torch.get_num_threads()
    progress = _Progress(watcher)
    waiting: deque[Future[Any]] = deque()
    # one thread each: torch would start as many as there are cores for each of them, beside those of a teacher on the CPU,
    # and ld took 1.20 times the bare teacher's time on two cores instead of 1.10
    with ThreadPoolExecutor(threads, "encode", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for shard in todo:
                futures: list[Future[Packed]] = []
                for items in chunks[shard]:
                    batch = next(samples)
                    values = teacher_rows(plan, batch)
                    exact = _exact(plan, batch, values) if not futures else None
                    futures.append(pool.submit(_pack, plan, items, batch, values, exact))
                    waiting.append(futures[-1])
                    while len(waiting) > AHEAD * threads:
                        progress.finished(waiting)
                    progress.advance(len(items))
                # one thread takes tasks in order, so this one's micro-batches are done, or being done, when it begins
                waiting.append(pool.submit(_write_shard, plan, writer, shard, futures))
            while waiting:
                progress.finished(waiting)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(torch_threads)  # what later threads start with
    return progress.rows


class _Progress:
    """What the bar says: rows and megabytes a second, how much smaller they became, and how long the teacher waited."""

    def __init__(self, watcher: Watcher) -> None:
        self.rows = 0
        self._watcher = watcher
        self._raw = self._stored = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def finished(self, waiting: deque[Future[Any]]) -> None:
        """Wait for the oldest task; its error is raised here."""
        began = time.perf_counter()
        result = waiting.popleft().result()
        self._waited += time.perf_counter() - began
        if isinstance(result, Packed):
            self._raw += result.raw
            self._stored += sum(len(c) for chunks in result.chunks.values() for c in chunks.values())

    def advance(self, rows: int) -> None:
        self.rows += rows
        seconds = time.perf_counter() - self._started
        self._watcher.advance(
            rows,
            f"{self.rows / seconds:.1f} images/s, {self._stored / 2**20 / seconds:.1f} MB/s, "
            f"{self._raw / max(1, self._stored):.1f}x smaller than float32, "
            f"waiting on the disk {100 * self._waited / seconds:.0f} %",
        )


def _micro_batches(plan: Plan, start: int, stop: int) -> list[list[Item]]:
    """The micro-batches of a shard: rows in order, grouped by orientation."""
    buckets: dict[str, list[Item]] = {}
    for row in range(start, stop):
        item = plan.item(row)
        buckets.setdefault(str(orientation(plan.source, item).size), []).append(item)
    size = plan.forward.micro_batch
    return [b[k : k + size] for b in buckets.values() for k in range(0, len(b), size)]


def _pack(
    plan: Plan, items: list[Item], samples: list[Sample], values: list[dict[str, NDArray[np.float32]]],
    exact: list[dict[str, NDArray[np.float32]]] | None,
) -> Packed:  # fmt: skip
    encoding, precision = ErrorMeter(), ErrorMeter()
    layout = plan.schema.layout()
    chunks, raw = {}, 0
    for item, sample, value in zip(items, samples, values, strict=True):
        row = encode_row(plan, sample, value)
        decoded = plan.schema.decode(collate_rows([row], layout), plan.needs)
        _compare(plan, sample, encoding, value, {k: row_tensor(v) for k, v in decoded.items()})
        chunks[item] = {a.path: pack_chunk(row[a.path], a.shape, a.dtype) for a in layout}
        raw += sum(v.nbytes for v in value.values()) + (sample.image.nbytes if plan.schema.images else 0)
    if exact is not None:
        for sample, reference, value in zip(samples, exact, values, strict=True):
            _compare(plan, sample, precision, reference, value)
    return Packed(chunks, raw, encoding.sums, precision.sums)


def _exact(
    plan: Plan, samples: list[Sample], values: list[dict[str, NDArray[np.float32]]]
) -> list[dict[str, NDArray[np.float32]]] | None:
    """The tensors of a float32 teacher, when ours is not one: the first micro-batch of each shard is measured."""
    if plan.forward.precision == "fp32":
        return None
    boxes = AT_PROPOSALS[0].key
    same = [torch.from_numpy(v[boxes]).to(plan.device) for v in values] if boxes in values[0] else None
    return teacher_rows(replace(plan, forward=replace(plan.forward, precision="fp32")), samples, same)


def _write_shard(plan: Plan, writer: StoreWriter, shard: int, futures: list[Future[Packed]]) -> int:
    encoding, precision = ErrorMeter(), ErrorMeter()
    rows: dict[Item, dict[str, bytes]] = {}
    for packed in (f.result() for f in futures):
        rows |= packed.chunks
        encoding.join(packed.encoding)
        precision.join(packed.precision)
    ordered = [rows[plan.item(r)] for r in range(*plan.schema.shard_range(shard))]
    chunks = {a.path: [row[a.path] for row in ordered] for a in plan.schema.layout()}
    return writer.write_chunks(shard, chunks, {"encoding": encoding.sums, "precision": precision.sums})


def _compare(
    plan: Plan, sample: Sample, meter: ErrorMeter, exact: Mapping[str, NDArray[np.float32]],
    other: Mapping[str, NDArray[np.float32]],
) -> None:  # fmt: skip
    """Add the error of one row; cells that no loss reads do not count."""
    for tensor in plan.schema.tensors:
        key = tensor.need.key
        theirs = other[key][0] if other[key].ndim > exact[key].ndim else other[key]
        keep: Any = slice(None)
        if tensor.need.dense:
            keep = plan.schema.valid_rows(tensor, sample.valid).numpy()
        meter.add(key, exact[key][keep], theirs[keep])


def _by_name(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema's JSON with the tensors under their names, so that a difference can be read."""
    tensors = {f"{t['name']}@{t['region']}": t["encoding"]["name"] for t in schema["tensors"]}
    return {**schema, "tensors": ", ".join(f"{k} {v}" for k, v in sorted(tensors.items()))}
