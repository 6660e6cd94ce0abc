"""``cache-teacher --estimate``: bytes, time and break-even of a store, before anything of it is written.

Bytes: what a few real rows took for each entry, box or valid cell, times how many there are, which the annotations and the
canvas say. Time: the slowest of the stages that work side by side (see ``stage_seconds``), at the pace of a short probe.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdcli.data.coco import has_split, open_split
from kdcli.engine.caching.estimate.count import ElementCounts, count_micro_batches, count_units, element_bytes, rows_of
from kdcli.engine.caching.estimate.probe import Probe, StageTimings, run_probe
from kdcli.engine.caching.plan import StorePlan
from kdcli.engine.caching.teacher_ap import scores
from kdcli.engine.caching.write import Part
from kdcli.engine.evaluation.evaluate import evaluation_batches
from kdcli.engine.loading.samples import Item, SampleSource
from kdcli.engine.runtime.threads import usable_cores
from kdcli.store.image_codec import PIXELS
from kdcli.store.schema import StoreSchema
from kdcli.store.shards import pack_chunk
from kdcli.store.storage.base import Where
from kdcli.store.storage.resolve import open_storage
from kdcli.tensors import Region

EPOCHS = 12  # of a usual student
MARGIN = 1.1  # bytes are known to 10 %: ask for that much more room


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one process has to do."""

    rows: int
    micro_batches: int
    micro_batch: int
    shards: int
    bytes: int
    val_rows: int  # that the teacher's AP is measured on
    val_batches: int
    workers: int  # data workers
    cores: int


@dataclass(frozen=True)
class BreakEven:
    """When the store has cost less than a teacher that runs along in training. Reading it costs about nothing."""

    live_epoch_seconds: float  # forward passes of a live teacher in one epoch, which sees each image once
    epochs: float  # of one student, after which the store is paid back
    students: float  # the same in students of ``epochs_each`` epochs
    epochs_each: int
    store_seconds: float  # by one process


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a store will take."""

    rows: int
    bytes_total: int  # compressed, on disk
    bytes_by_tensor: dict[str, int]  # "index": hashes, geometry, counts and entries
    bytes_by_array: dict[str, int]
    bytes_raw: int  # before compression, padding of sparse arrays not counted
    seconds: float  # of this process, the teacher's AP on val included
    rows_per_s: float
    slowest: str  # stage that decides the time: teacher, loading, encoding, disk or cores
    disk_timed: bool  # False: an object store, or a folder whose parent cannot be written to
    free_bytes: int | None  # None: an object store, which has no end
    counted_rows: int
    probed_rows: int
    break_even: BreakEven


def estimate(plan: StorePlan, out: Where, part: Part | None = None) -> Estimate:
    """Count rows, run a short probe, and scale up. ``part``: the time is that of this share of the store, bytes are of all.

    Beside ``out``, in a folder that is gone afterwards, some rows are written to time the disk.
    """
    storage = open_storage(out)
    counts = count_units(plan)
    probe = run_probe(plan, counts, storage)
    by_array = array_bytes(plan.schema, counts, probe)
    total = sum(by_array.values())
    everything = Part().shards(plan.schema.num_shards)
    mine = everything if part is None else part.shards(plan.schema.num_shards)
    work = _work(plan, mine, total)
    stages = stage_seconds(probe.pace, work)
    seconds = run_seconds(probe.pace, work)
    whole = seconds if part is None else run_seconds(probe.pace, _work(plan, everything, total))
    image_seconds = probe.pace.teacher / plan.teacher.forward.micro_batch
    return Estimate(
        rows=plan.schema.rows, bytes_total=total, bytes_by_tensor=tensor_bytes(plan.schema, by_array),
        bytes_by_array=by_array, bytes_raw=_raw_bytes(plan.schema, counts), seconds=seconds,
        rows_per_s=work.rows / seconds, slowest=max(stages, key=lambda name: stages[name]),
        disk_timed=probe.on_target, free_bytes=storage.free_bytes(), counted_rows=len(counts.items),
        probed_rows=len(probe.chosen), break_even=break_even(whole, len(plan.positions), image_seconds),
    )  # fmt: skip


def break_even(store_seconds: float, images: int, image_seconds: float) -> BreakEven:
    """``image_seconds``: the teacher's forward for one image. A store of V views costs V forward passes an image, and a
    live teacher one an epoch, since an epoch takes each image once, in one of its views."""
    live = images * image_seconds
    return BreakEven(live, store_seconds / live, store_seconds / live / EPOCHS, EPOCHS, store_seconds)


def stage_seconds(pace: StageTimings, work: Workload) -> dict[str, float]:
    """Seconds that each stage needs for all rows. They overlap, so that the slowest decides.

    ``teacher``: forward passes, with what goes on between them, and the slowing down by what goes on beside them.
    ``loading``: decoding in the data workers. ``encoding``: encoding and compression in the threads. ``disk``: writing.
    ``cores``: the CPU seconds of all of these over the cores.
    """
    loading = work.rows * pace.load_cpu if work.workers else 0.0  # else in ``front_cpu``
    return {
        "teacher": work.micro_batches * pace.front,
        "loading": work.rows * pace.load / work.workers if work.workers else 0.0,
        "encoding": work.rows * pace.encode,
        "disk": work.shards * pace.shard + work.bytes * pace.byte,
        "cores": (work.micro_batches * pace.front_cpu + loading) / work.cores,
    }


def run_seconds(pace: StageTimings, work: Workload) -> float:
    """Seconds of a whole run: the teacher's AP on val, the start, the rows, and the end."""
    loading, passes = work.val_rows * pace.load, work.val_batches * pace.evaluate
    if work.workers:  # beside the passes, which it slows down
        passes += work.val_batches * min(max(0.0, pace.front - pace.teacher), work.micro_batch * pace.load_cpu)
        val = max(passes, loading / work.workers)
    else:
        val = passes + loading
    start = pace.start * (2 if work.val_rows else 1)
    return val + start + max(stage_seconds(pace, work).values()) + pace.drain


def array_bytes(schema: StoreSchema, counts: ElementCounts, probe: Probe) -> dict[str, int]:
    """Bytes of each array on the disk: a row of nothing but padding, what each element adds to it, and the index."""
    found = {}
    index = schema.num_shards * (16 * schema.shard_rows + 4)
    for array in schema.layout():
        empty = len(pack_chunk(np.zeros((0, *array.shape[1:])), array))
        units = int(counts.units[array.path][list(probe.chosen)].sum())
        raw = element_bytes(array)  # where the probe has none: not compressed
        each = max(0.0, probe.chunk_bytes[array.path] - empty * len(probe.chosen)) / units if units else raw
        found[array.path] = round(schema.rows * empty + counts.totals[array.path] * each) + index
    return found


def tensor_bytes(schema: StoreSchema, by_array: dict[str, int]) -> dict[str, int]:
    """Bytes by tensor, of ``images`` if they are stored, and of ``index``: what a row is and which entries it has."""
    found = {t.need.key: sum(by_array[a.path] for a in schema.tensor_arrays(t).values()) for t in schema.tensors}
    if schema.images:
        found["images"] = by_array[PIXELS]
    return {**found, "index": sum(by_array.values()) - sum(found.values())}


def _work(plan: StorePlan, shards: range, total: int) -> Workload:
    rows, root, size = rows_of(plan, shards), Path(plan.options.data), plan.teacher.forward.micro_batch
    val: list[list[Item]] = []
    if scores(plan) and has_split(root, "val"):
        val_split, detector = open_split(root, "val"), plan.teacher.forward.detector
        source = SampleSource.for_evaluation(val_split, plan.source.canvas, detector)
        val = evaluation_batches(source, list(range(source.dataset.num_images)), size)
    return Workload(
        rows=rows, micro_batches=count_micro_batches(plan, shards), micro_batch=size,
        shards=len(shards), bytes=round(total * rows / plan.schema.rows),
        val_rows=sum(map(len, val)), val_batches=len(val), workers=plan.teacher.workers,
        cores=usable_cores(),
    )  # fmt: skip


def _raw_bytes(schema: StoreSchema, counts: ElementCounts) -> int:
    """Of proposals as many as fit: the teacher decides how many there are."""
    proposals = {
        a.path for t in schema.tensors if t.need.region == Region.PROPOSALS for a in schema.tensor_arrays(t).values()
    }
    return round(
        sum(
            counts.totals[a.path] * element_bytes(a)
            if a.sparse and a.path not in proposals
            else schema.rows * a.row_bytes
            for a in schema.layout()
        )
    )
