"""What writing a store costs beyond the teacher's own inference, in one process and interleaved.

Each round runs the teacher over all rows twice: bare (images loaded as always, the same micro-batches, the outputs thrown
away) and as ``cache-teacher`` does, into a fresh store. Prints one JSON object; the ratio may be 1.10.

    python benchmarks/write_cost.py [--data DATA --teacher RUN] --out FOLDER [--method ld ld,rm pfi bckd defeat]

Without --data it draws a data set, without --teacher it makes a random one. ``--profile`` adds what every stage takes by
itself, one after the other: the processor time that has to fit beside the teacher's.
"""

from __future__ import annotations

import os

from kdcli.store.encoding_error import Measured

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from common import draw_data, machine, pairwise, part_of, plan_of, random_teacher, verdict

from kdcli.detectors.weights import load_detector
from kdcli.engine.caching.plan import StorePlan
from kdcli.engine.caching.write import compare_row, encode_row, shard_micro_batches, write_store
from kdcli.engine.loading.loader import Loader
from kdcli.engine.loading.samples import Item, Sample, SampleSource, collate
from kdcli.engine.runtime.memory import keep_freed_memory
from kdcli.store.arrays import ArraySpec
from kdcli.store.batch_buffers import collate_arrays
from kdcli.store.encoding_error import ErrorMeter
from kdcli.store.encodings import Arrays
from kdcli.store.schema import row_tensor
from kdcli.store.shards import pack_chunk
from kdcli.store.writer import StoreWriter, create_store
from kdcli.structures import Batch
from kdcli.tensors import Tensors

METHODS = ("ld", "ld,rm", "pfi", "bckd", "defeat")
LIMIT = 1.10
T = TypeVar("T")


def micro_batches(plan: StorePlan) -> list[list[Item]]:
    """The rows as ``cache-teacher`` cuts them: shard by shard, one orientation each."""
    return [items for s in range(plan.schema.num_shards) for items in shard_micro_batches(plan, s)]


def images_alone(plan: StorePlan) -> SampleSource:
    """The same images and views, without the assignment and the regions, which inference does not need."""
    return plan.source.with_regions(plan.source.region_spec, frozenset())


def infer(plan: StorePlan) -> None:
    """The bare teacher over all rows; its outputs are thrown away."""
    for samples in Loader(images_alone(plan), plan.teacher.workers).samples(micro_batches(plan)):
        plan.teacher.forward.outputs(torch.stack([s.image for s in samples]).to(plan.teacher.device))
    wait_for(plan.teacher.device)


def wait_for(device: torch.device) -> None:
    """Until the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bar:
    """A reporter that keeps the last line of the progress bar."""

    def __init__(self) -> None:
        self.info = ""

    def stage(self, label: str, total: int) -> None:
        """Ignored."""

    def advance(self, units: int = 1, info: str = "") -> None:
        """A step of the bar."""
        self.info = info or self.info

    def message(self, text: str) -> None:
        """Ignored."""


def timed(task: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock, and of all processors, data workers included."""
    started, used = time.perf_counter(), os.times()
    task()
    now = os.times()
    return time.perf_counter() - started, sum(now[:4]) - sum(used[:4])


def measure(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Both passes, interleaved, and their ratio."""
    began = time.perf_counter()
    plan = plan_of(args.data, args.teacher, method, args.canvas, args.workers)
    planned = time.perf_counter() - began
    keep_freed_memory(plan.teacher.device)  # as the command does, and for both passes
    store, bar = args.out / "store", Bar()
    bare: list[tuple[float, float]] = []
    cached: list[tuple[float, float]] = []

    def write() -> None:
        write_store(plan, store, bar)

    infer(plan)  # not counted: the first pass of a process is slower
    for number in range(args.rounds):
        tasks = [(bare, lambda: infer(plan)), (cached, write)]
        for times, task in tasks if number % 2 == 0 else tasks[::-1]:
            times.append(timed(task))
        size = sum(f.stat().st_size for f in store.rglob("*") if f.is_file())
        shutil.rmtree(store)
    found: dict[str, Any] = {
        "cached_over_bare": pairwise([c for c, _ in cached], [b for b, _ in bare], LIMIT),
        # what a loaded machine disturbs less: both of a pair waited for others, neither is charged for it
        "processor_time_ratio": round(statistics.median(c / b for (_, c), (_, b) in zip(cached, bare, strict=True)), 3),
        "bare_images_per_s": plan.schema.rows / statistics.median(b for b, _ in bare),
        "cached_images_per_s": plan.schema.rows / statistics.median(c for c, _ in cached),
        "waiting_percent": int(re.findall(r"disk (\d+) %", bar.info)[0]),
        "rows": plan.schema.rows,
        "bytes_a_row": size // plan.schema.rows,
        "planning_s": planned,  # of neither pass: the teacher is loaded, the images are checked
    }
    if args.profile:
        found["profile"] = profile(plan, args.out)
    return found


def as_pytorch_allocates(args: argparse.Namespace) -> float:
    """Images/s of the bare teacher in a process that was left as it is: to be asked before ``measure``."""
    plan = plan_of(args.data, args.teacher, args.method[0], args.canvas, args.workers)
    infer(plan)  # not counted: the first pass of a process is slower
    return plan.schema.rows / statistics.median(timed(lambda: infer(plan))[0] for _ in range(3))


class Stages:
    """Seconds by stage, of the clock and of all processors."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def run(self, name: str, task: Callable[..., T], *arguments: Any) -> T:
        """Time one task."""
        started, used = time.perf_counter(), time.process_time()
        result = task(*arguments)
        times = self.seconds.setdefault(name, [0.0, 0.0])
        times[0] += time.perf_counter() - started
        times[1] += time.process_time() - used
        return result


def load_all(source: SampleSource, items: list[Item]) -> list[Sample]:
    """Their samples, one by one."""
    return [source.load(item) for item in items]


def collate_on(samples: list[Sample], device: torch.device) -> Batch:
    """A batch without the teacher's rows, where the teacher is."""
    return collate(samples, None).to(device)


def decode_row(plan: StorePlan, row: Arrays) -> Tensors:
    """What a reader would make of a row."""
    return plan.schema.decode(collate_arrays([row], plan.schema.layout()), plan.needs)


def compressed(row: Arrays, layout: Sequence[ArraySpec]) -> dict[str, bytes]:
    """The chunk of each array."""
    return {array.path: pack_chunk(row[array.path], array) for array in layout}


def profile(plan: StorePlan, out: Path) -> dict[str, Any]:
    """Milliseconds a row of every stage, run alone: of the clock and of the processors.

    Stages of a shard come one after the other here; ``cache-teacher`` runs them beside the teacher.
    """
    stages, images, layout = Stages(), images_alone(plan), plan.schema.layout()
    store = out / "profile"
    shutil.rmtree(store, ignore_errors=True)
    create_store(store, plan.manifest, plan.source.dataset.annotations.image_ids[plan.positions])
    start, stop = plan.schema.shard_range(0)
    batches = shard_micro_batches(plan, 0)
    packed: dict[Item, dict[str, bytes]] = {}
    for items in batches:
        stages.run("load: images", load_all, images, items)
        samples = stages.run("load: whole", load_all, plan.source, items)
        batch = stages.run("collate", collate_on, samples, plan.teacher.device)
        stages.run("teacher: forward", plan.teacher.forward.outputs, batch.images)
        values = stages.run("teacher: forward, collate, read, copy", plan.teacher.rows, samples, plan.needs)
        for item, sample, value in zip(items, samples, values, strict=True):
            row = stages.run("encode", encode_row, plan, sample, value)
            decoded = stages.run("check: decode", decode_row, plan, row)
            read = {key: row_tensor(tensor) for key, tensor in decoded.items()}
            stages.run("check: compare", compare_row, plan, sample, ErrorMeter(), value, read)
            packed[item] = stages.run("compress", compressed, row, layout)
    chunks = {a.path: [packed[plan.item(r)][a.path] for r in range(start, stop)] for a in layout}
    stages.run("write", StoreWriter(store, plan.schema).write_chunks, 0, chunks, Measured())
    shutil.rmtree(store)
    return table(stages.seconds, stop - start)


def table(seconds: dict[str, list[float]], rows: int) -> dict[str, Any]:
    """Milliseconds a row, [clock, processors]; what whole tasks contain is taken out of them."""
    ms = {name: [1000 * s / rows for s in times] for name, times in seconds.items()}

    def less(name: str, *others: str) -> list[float]:
        return [ms[name][k] - sum(ms[other][k] for other in others) for k in (0, 1)]

    found = {
        "load: images": ms["load: images"],
        "teacher: forward": ms["teacher: forward"],
        "load: assignment, regions": less("load: whole", "load: images"),
        "teacher: collate": ms["collate"],
        "teacher: read, copy": less("teacher: forward, collate, read, copy", "teacher: forward", "collate"),
        **{name: ms[name] for name in ("encode", "check: decode", "check: compare", "compress", "write")},
    }
    bare = sum(found[name][1] for name in ("load: images", "teacher: forward"))
    beyond = sum(times[1] for times in found.values()) - bare
    rounded = {name: [round(t, 2) for t in times] for name, times in found.items()}
    return {
        "ms_a_row_clock_processors": rounded,
        "processor_time_beyond_bare": verdict(beyond / bare, round(LIMIT - 1, 2)),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="")
    parser.add_argument("--teacher", default="")
    parser.add_argument("--teacher-model", default="gfl_mobilenet_v2")
    parser.add_argument("--teacher-channels", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "kdcli-write-cost")
    parser.add_argument("--method", nargs="+", default=list(METHODS))
    parser.add_argument("--rows", type=int, default=256, help="rows (two a training image) of each pass; 0: all")
    parser.add_argument("--canvas", default="256x320")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.data:
        args.data = draw_data(args.out, args.rows // 2)
    if not args.teacher:
        args.teacher = random_teacher(args.out, args.data, args.teacher_model, args.teacher_channels, args.canvas)
    args.teacher_model = load_detector(args.teacher)[0].spec.name
    args.data = part_of(args.data, args.out, args.rows // 2, val=False)
    shutil.rmtree(args.out / "store", ignore_errors=True)  # of a run that was broken off
    settings = {
        k: v
        for k, v in vars(args).items()
        if k not in ("out", "data", "teacher", "teacher_channels", "method", "profile")
    }
    plain = as_pytorch_allocates(args)
    found = {method: measure(args, method) for method in args.method}
    for result in found.values():
        result["cached_over_bare_as_pytorch_allocates"] = round(plain / result["cached_images_per_s"], 3)
    print(
        json.dumps(
            {"methods": found, "bare_images_per_s_as_pytorch_allocates": plain, "settings": settings, **machine()},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
