"""Fills a store: the teacher's forward passes here, encoding, compression and the disk in threads behind it.

A teacher on a GPU runs on while threads encode and data workers load. One on a CPU wants every core, so they take turns:
images are loaded and rows encoded between its passes, on all cores, unless data workers are asked for. Neither waits for
the disk.

Rows are computed shard by shard; inside a shard they are grouped by orientation and cut into micro-batches of a
recorded size, so that a row's numbers do not depend on where a killed run was taken up again, nor on how many processes
share the work.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcli.detectors.read import AT_PROPOSALS
from kdcli.engine.caching.plan import StorePlan
from kdcli.engine.caching.teacher_ap import measure_teacher, require_able
from kdcli.engine.loading.loader import Loader
from kdcli.engine.loading.orientation import batches_by_orientation
from kdcli.engine.loading.samples import Item, Sample
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.engine.runtime.threads import InlineExecutor, thread_pool, usable_cores
from kdcli.errors import StoreError
from kdcli.geometry.regions import guard
from kdcli.store.batch_buffers import collate_arrays
from kdcli.store.encoding_error import ErrorMeter, Measured
from kdcli.store.image_codec import PIXELS, encode_pixels
from kdcli.store.maintenance import record_errors
from kdcli.store.manifest import Manifest, read_manifest
from kdcli.store.row_identity import pack_identity
from kdcli.store.schema import row_tensor
from kdcli.store.shards import pack_chunk
from kdcli.store.storage.base import Storage, Where
from kdcli.store.storage.resolve import open_storage
from kdcli.store.writer import StoreWriter, create_store

MAX_THREADS = 4  # behind the teacher; one encodes and compresses about 60 rows/s of PFI's dense tensors at 256x320
SMALL_ROW = 500_000  # bytes
Load = Callable[[list[list[Item]]], Iterator[list[Sample]]]  # the samples of each planned batch
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
    """A row, encoded: chunks by array path, raw bytes, and the errors of the encodings."""

    chunks: dict[str, bytes]
    raw: int
    encoding: dict[str, dict[str, float]]
    precision: dict[str, dict[str, float]]


def _encoders(plan: StorePlan) -> tuple[AbstractContextManager[Executor], int]:
    """Who encodes, with how many threads: half of the cores, up to MAX_THREADS; in turns, those of the teacher."""
    if not plan.teacher.interleaved:
        threads = min(MAX_THREADS, max(1, usable_cores() // 2))
    elif sum(a.row_bytes for a in plan.schema.layout()) > SMALL_ROW:
        threads = torch.get_num_threads()
    else:
        # threads that do small steps in Python wait for each other: ld at 256x320 takes two 1.0 ms a row, and one 0.7
        return InlineExecutor(), 1
    return thread_pool(threads, "encode"), threads


def write_store(
    plan: StorePlan, out: Where, reporter: ProgressReporter, part: Part | None = None, load: Load | None = None
) -> int:
    """Write what is missing of the store at ``out``; returns how many rows were written in this call.

    With a ``part``, only the shards of that part: other processes may write the others at the same time. An existing
    store is continued if it is the same one, else StoreError lists the fields that differ; also when another process is
    writing all of it. ``load``: instead of the plan's data workers.
    """
    storage = open_storage(out)
    load = load or Loader(plan.source, plan.teacher.workers).samples
    with storage.lock_creation():  # the others wait for the one that makes it
        if not storage.exists():
            _create(plan, storage, reporter)
    version = require_same(plan, storage).schema.version  # a store of an older format is continued in it
    plan = plan.with_schema(replace(plan.schema, version=version))
    with storage.lock(shared=part is not None):
        return _write_part(plan, storage, part or Part(), load, reporter)


def _create(plan: StorePlan, out: Storage, reporter: ProgressReporter) -> None:
    teacher = replace(plan.manifest.teacher, ap=measure_teacher(plan, reporter))
    manifest = replace(plan.manifest, teacher=teacher)
    create_store(out, manifest, plan.source.dataset.annotations.image_ids[plan.positions])


def require_same(plan: StorePlan, out: Storage) -> Manifest:
    """The manifest of the store at ``out``.

    Raises StoreError when it is not the one of ``plan``, GateError when its teacher is too weak.
    """
    stored = read_manifest(out)
    differences = stored.differences(plan.manifest)
    if differences:
        raise StoreError(
            f"'{out}' is another store: {'; '.join(differences)}; choose another --out, or delete it first"
        )
    require_able(stored.teacher.ap, plan.options.min_teacher_ap)
    return stored


def _write_part(plan: StorePlan, out: Storage, part: Part, load: Load, reporter: ProgressReporter) -> int:
    rows = _write_shards(plan, out, part, load, reporter)
    record_errors(out)  # by the part that comes last; and by a run that was killed between the last shard and this
    return rows


def _write_shards(plan: StorePlan, out: Storage, part: Part, load: Load, reporter: ProgressReporter) -> int:
    writer = StoreWriter(out, plan.schema)
    done, mine = writer.done(), part.shards(plan.schema.num_shards)
    ranges = {s: plan.schema.shard_range(s) for s in mine}
    todo = [s for s in mine if s not in done]
    reporter.stage("cache-teacher", sum(stop - start for start, stop in ranges.values()))
    reporter.advance(sum(ranges[s][1] - ranges[s][0] for s in mine if s in done))
    chunks = {s: shard_micro_batches(plan, s) for s in todo}
    samples = load([c for s in todo for c in chunks[s]])
    (pool, threads), turns, progress = _encoders(plan), plan.teacher.interleaved, _Progress(reporter)
    most = 0 if turns else AHEAD * threads * plan.teacher.forward.micro_batch
    with pool as encoders, thread_pool(threads, "write") as writers:
        rows: deque[Future[Packed]] = deque()
        files: deque[Future[int]] = deque()
        for shard in todo:
            packed: dict[Item, Future[Packed]] = {}
            for items in chunks[shard]:
                batch = next(samples)
                values = plan.teacher.rows(batch, plan.needs)
                exact = _exact(plan, batch, values) if not packed else [None] * len(items)
                for item, sample, value, reference in zip(items, batch, values, exact, strict=True):
                    packed[item] = encoders.submit(_pack, plan, sample, value, reference)
                rows.extend(packed[item] for item in items)
                progress.encoded(rows, most, blocks_teacher=not turns)
                progress.advance(len(items))
            files.append(writers.submit(_write_shard, plan, writer, shard, packed))
            progress.written(files, threads)
        progress.encoded(rows, 0, blocks_teacher=True)
        progress.written(files, 0)
    return progress.rows


class _Progress:
    """What the bar says: rows and megabytes a second, how much smaller they became, and how long the teacher waited."""

    def __init__(self, reporter: ProgressReporter) -> None:
        self.rows = 0
        self._watcher = reporter
        self._raw = self._stored = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def encoded(self, rows: deque[Future[Packed]], most: int, *, blocks_teacher: bool) -> None:
        """Wait for the oldest rows until ``most`` are left, and raise their errors.

        ``blocks_teacher``: the teacher waits for it.
        """
        began = time.perf_counter()
        while len(rows) > most:
            row = rows.popleft().result()
            self._raw += row.raw
            self._stored += sum(map(len, row.chunks.values()))
        self._waited += (time.perf_counter() - began) * blocks_teacher

    def written(self, files: deque[Future[int]], most: int) -> None:
        """Wait for the oldest shards until ``most`` are left. Raises their errors."""
        began = time.perf_counter()
        while len(files) > most:
            files.popleft().result()
        self._waited += time.perf_counter() - began

    def advance(self, rows: int) -> None:
        self.rows += rows
        seconds = time.perf_counter() - self._started
        self._watcher.advance(
            rows,
            f"{self.rows / seconds:.1f} images/s, {self._stored / 2**20 / seconds:.1f} MB/s, "
            f"{self._raw / max(1, self._stored):.1f}x smaller than float32, "
            f"waiting on the disk {100 * self._waited / seconds:.0f} %",
        )


def shard_micro_batches(plan: StorePlan, shard: int) -> list[list[Item]]:
    """The micro-batches of a shard: rows in order, grouped by orientation."""
    items = [plan.item(row) for row in range(*plan.schema.shard_range(shard))]
    return batches_by_orientation(plan.source, items, plan.teacher.forward.micro_batch)


def _pack(
    plan: StorePlan, sample: Sample, value: dict[str, NDArray[np.float32]], exact: dict[str, NDArray[np.float32]] | None
) -> Packed:
    encoding, precision = ErrorMeter(), ErrorMeter()
    layout = plan.schema.layout()
    row = encode_row(plan, sample, value)
    decoded = plan.schema.decode(collate_arrays([row], layout), plan.needs)
    compare_row(plan, sample, encoding, value, {k: row_tensor(v) for k, v in decoded.items()})
    if exact is not None:
        compare_row(plan, sample, precision, exact, value)
    chunks = {a.path: pack_chunk(row[a.path], a) for a in layout}
    raw = sum(v.nbytes for v in value.values()) + (sample.image.nbytes if plan.schema.images else 0)
    return Packed(chunks, raw, encoding.sums, precision.sums)


def _exact(
    plan: StorePlan, samples: list[Sample], values: list[dict[str, NDArray[np.float32]]]
) -> Sequence[dict[str, NDArray[np.float32]] | None]:
    """The tensors of a float32 teacher, when ours is not one: the first micro-batch of each shard is measured."""
    if plan.teacher.forward.precision == "fp32":
        return [None] * len(samples)
    boxes = AT_PROPOSALS[0].key
    same = [torch.from_numpy(v[boxes]).to(plan.teacher.device) for v in values] if boxes in values[0] else None
    return plan.teacher.exact.rows(samples, plan.needs, same)


def _write_shard(plan: StorePlan, writer: StoreWriter, shard: int, packed: Mapping[Item, Future[Packed]]) -> int:
    encoding, precision = ErrorMeter(), ErrorMeter()
    rows: dict[Item, dict[str, bytes]] = {}
    for item, row in ((item, future.result()) for item, future in packed.items()):
        rows[item] = row.chunks
        encoding.join(row.encoding)
        precision.join(row.precision)
    ordered = [rows[plan.item(r)] for r in range(*plan.schema.shard_range(shard))]
    chunks = {a.path: [row[a.path] for row in ordered] for a in plan.schema.layout()}
    return writer.write_chunks(shard, chunks, Measured(encoding=encoding.sums, precision=precision.sums))


def compare_row(
    plan: StorePlan, sample: Sample, meter: ErrorMeter, exact: Mapping[str, NDArray[np.float32]],
    other: Mapping[str, NDArray[np.float32]],
) -> None:  # fmt: skip
    """Add the error of one row; cells that no loss reads do not count."""
    for tensor in plan.schema.tensors:
        key = tensor.need.key
        theirs = other[key][0] if other[key].ndim > exact[key].ndim else other[key]
        keep = plan.schema.valid_rows(tensor, sample.valid).numpy() if tensor.need.dense else None
        meter.add(key, exact[key], theirs, keep)


def encode_row(plan: StorePlan, sample: Sample, value: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[Any]]:
    """The stored arrays by path of a sample whose teacher tensors are ``value``. Raises GateError as the schema does."""
    tied = guard(sample.boxes, sample.labels, plan.source.definition)
    arrays: dict[str, Any] = {
        "row/identity": pack_identity(sample.content_hash, tied, sample.key, plan.schema.version),
        "row/geometry": sample.geometry.to_array(),
    }
    if plan.schema.images:
        arrays[PIXELS] = encode_pixels(sample.image.numpy())
    if sample.entries is not None:
        entries = sample.entries
        arrays["entries/count"] = np.array([len(entries.index)], np.int32)
        arrays["entries/index"] = entries.index.numpy().astype(np.int32)
        arrays["entries/flag"] = entries.flag.numpy()
        arrays["entries/gt"] = entries.gt.numpy().astype(np.int16)
        arrays["entries/weight"] = entries.weight.numpy()
    counts = {t.count: len(value[t.need.key]) for t in plan.schema.tensors if t.count and not t.need.at_entries}
    arrays.update({str(path): np.array([count], np.int32) for path, count in counts.items()})
    arrays.update(plan.schema.encode(value, sample.valid.numpy()))
    return arrays
