"""A store of COCO train2017's size, simulated: what opening, reading, resuming, verifying and info cost there. Prints JSON.

118,287 images in two views, with the boxes of COCO's statistics and random teacher values at the shapes these have (see
``scale_store.py``), written by kdcli's own writer and killed on the way. Each figure is of a process of its own. Cold: the
store's files are not in the page cache of this machine; names and sizes of files may be.

    python benchmarks/scale.py --out FOLDER [--images 118287] [--canvas 416x672] [--shard-rows 23] [--plot FILE.png]

FOLDER needs the room of the store and 10 GB more; all of it is deleted at the end, unless --keep. On a FOLDER that was kept
it measures again, and writes nothing.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

STARTED = time.perf_counter()
UNFINISHED_AT = 0.9  # share of the shards that a resumed run finds
SPARE_BYTES = 10_000_000_000  # of the disk, for others
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print("USAGE", usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
sys.exit(code)
"""
SAMPLE_EVERY = 100  # rows between two looks at the memory
# kdcli is imported where it is used, so that the time and the memory of a process are those of what it measures


def rss() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def child(command: Sequence[str]) -> dict[str, Any]:
    """Run a command that prints JSON; its answer with wall and CPU seconds and peak memory of the whole process."""
    began = time.perf_counter()
    # by way of a small process: one that is forked from this one begins with the peak of this one
    found = subprocess.run(
        [sys.executable, "-c", LAUNCHER, sys.executable, *command], stdout=subprocess.PIPE, text=True
    )
    seconds = time.perf_counter() - began
    if found.returncode:
        raise SystemExit(f"{command} failed with {found.returncode}: {found.stdout[-500:]}")
    answer, _, usage = found.stdout.rpartition("USAGE")
    cpu, peak = usage.split()
    return {
        **json.loads(answer), "process_s": seconds, "process_cpu_s": float(cpu), "process_peak_mb": float(peak) / 1024
    }  # fmt: skip


# --- what the processes measure -------------------------------------------------------------------------------------


def annotations_role(args: argparse.Namespace) -> dict[str, Any]:
    """Open the annotations; the first time they are parsed, by a child."""
    from kdcli.data.coco import open_split

    before, began = rss(), time.perf_counter()
    dataset = open_split(args.out / "data", "train")
    found = {"open_s": time.perf_counter() - began, "memory_mb": (rss() - before) / 2**20}
    return found | {"images": dataset.num_images, "boxes": len(dataset.annotations.category)}


def resume_role(args: argparse.Namespace) -> dict[str, Any]:
    """``cache-teacher`` on an unfinished store, until the first micro-batch that is missing lies before the teacher."""
    import scale_store

    from kdcli.engine.caching import write as write_module
    from kdcli.engine.runtime.progress import NullReporter
    from kdcli.engine.teacher.forward import TeacherRunner

    found = {}

    def reached(name: str) -> None:
        found[f"{name}_s"], found[f"{name}_cpu_s"] = time.perf_counter() - STARTED, time.process_time()

    class Journal(NullReporter):
        def stage(self, label: str, total: int) -> None:
            reached("journal_read")

    class ReachedTeacher(BaseException):
        pass

    def teacher_rows(*_: Any) -> Any:
        reached("first_batch")
        raise ReachedTeacher

    reached("imports")
    plan = scale_store.make_plan(args.out, args.method, args.shard_rows)
    reached("planned")
    try:
        with patch.object(TeacherRunner, "rows", teacher_rows):
            write_module.write_store(plan, args.out / "store", Journal())
    except ReachedTeacher:
        return found
    raise SystemExit("nothing was missing")


def journal_role(args: argparse.Namespace) -> dict[str, Any]:
    """What is done with the manifest and the journal, one after the other; errors are recorded already."""
    from kdcli.store.journal import store_digest
    from kdcli.store.maintenance import record_errors
    from kdcli.store.manifest import read_manifest
    from kdcli.store.writer import StoreWriter

    store = args.out / "store"
    schema = read_manifest(store).schema
    work: dict[str, Callable[[], object]] = {
        "read_manifest_s": lambda: read_manifest(store),
        "done_s": lambda: StoreWriter(store, schema).done(),
        "record_errors_s": lambda: record_errors(store),
        "digest_s": lambda: store_digest(store),
    }
    found = {}
    for name, task in work.items():
        began = time.perf_counter()
        task()
        found[name] = time.perf_counter() - began
    return found


def open_role(args: argparse.Namespace) -> dict[str, Any]:
    """Open the store and read one row."""
    from kdcli.store.reader import StoreReader
    from kdcli.structures import RowKey

    before, began = rss(), time.perf_counter()
    reader = StoreReader(args.out / "store")
    opened, memory = time.perf_counter(), rss() - before
    reader.read(RowKey(reader.image_ids[len(reader.image_ids) // 2], reader.views[0]))
    first = time.perf_counter() - opened
    return {
        "imports_s": began - STARTED, "open_s": opened - began, "memory_mb": memory / 2**20, "first_row_ms": 1000 * first,
        "to_a_worker_mb": len(pickle.dumps(reader)) / 2**20,
    }  # fmt: skip


def read_role(args: argparse.Namespace) -> dict[str, Any]:
    """Random rows one after the other; the same rows each time."""
    import numpy as np

    from kdcli.store.reader import StoreReader
    from kdcli.structures import RowKey

    reader = StoreReader(args.out / "store")
    images, views = reader.image_ids, reader.views
    rows = np.random.default_rng(0).integers(0, reader.schema.rows, args.reads).tolist()
    seconds, memory, files = [], [], []
    cpu = time.process_time()
    for number, row in enumerate(rows):
        if number % SAMPLE_EVERY == 0:
            memory.append(rss() / 2**20)
            files.append(len(os.listdir("/proc/self/fd")))
        began = time.perf_counter()
        reader.read(RowKey(images[row // len(views)], views[row % len(views)]))
        seconds.append(time.perf_counter() - began)
    cpu = time.process_time() - cpu
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return {
        "rows": len(rows), "rows_per_s": len(rows) / sum(seconds), "cpu_ms": 1000 * cpu / len(rows),
        "p50_ms": p50, "p99_ms": p99, "worst_ms": 1000 * max(seconds), "open_files": max(files), "memory_mb": memory,
    }  # fmt: skip


ROLES = {
    "annotations": annotations_role, "resume": resume_role, "journal": journal_role, "open": open_role, "read": read_role,
}  # fmt: skip


# --- the run --------------------------------------------------------------------------------------------------------


def make(args: argparse.Namespace) -> dict[str, Any]:
    """Data, teacher and store, in an empty folder ``args.out``; the writers are killed once."""
    import scale_store

    from kdcli.store.maintenance import record_errors

    store = args.out / "store"
    found: dict[str, Any] = {}
    scale_store.make_data(args.out / "data", args.images, args.pool)
    scale_store.make_teacher(args.out / "teacher.pt", args.canvas)
    found["annotations_first"] = child([__file__, *sys.argv[1:], "--role", "annotations"])
    plan = scale_store.make_plan(args.out, args.method, args.shard_rows)
    pool, found["row"] = scale_store.make_pool(plan, args.pool)
    wanted = found["row"]["chunk_bytes"] * plan.schema.rows * 1.1
    if wanted + SPARE_BYTES > shutil.disk_usage(args.out).free:
        raise SystemExit(f"the store needs {wanted / 1e9:.1f} GB and 10 more; name another --canvas, or fewer --images")
    scale_store.create(plan, store)
    seconds = scale_store.write_and_kill(plan, store, pool)
    began = time.perf_counter()
    scale_store.write(plan, store, pool)
    seconds += time.perf_counter() - began
    record_errors(store)
    return found | {"write": {"seconds": seconds, **scale_store.write_times(store)}, "tree": scale_store.tree(store)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything about a store that is whole."""
    import scale_store

    store, me = args.out / "store", [__file__, *sys.argv[1:], "--role"]
    journal = sorted((store / "journal").glob("*.json"))
    found: dict[str, Any] = {"annotations_again": child([*me, "annotations"])}
    with scale_store.journal_without(journal[int(UNFINISHED_AT * len(journal)) :]):
        found["resume"] = child([*me, "resume"])
    found["journal"] = child([*me, "journal"])
    found["journal"] |= {"bytes": sum(file.stat().st_size for file in journal), "files": len(journal)}
    look = ["-m", "kdcli", "cache"]
    for name, task in {
        "open": [*me, "open"], "info": [*look, "info", str(store), "--json"], "read": [*me, "read"],
        "verify": [*look, "verify", str(store), "--json"],
    }.items():  # fmt: skip
        scale_store.drop_pages(store)
        found[f"{name}_cold"] = child(task)
        if name != "verify":
            found[f"{name}_warm"] = child(task)
    found["verify_cold"]["mb_per_s"] = found["verify_cold"]["bytes"] / 2**20 / found["verify_cold"]["process_s"]
    rows = str(min(4000, args.reads))
    # the first number reads the rows into the page cache, for the others
    found["workers"] = child([*look, "bench", str(store), "--workers", "0,0,1,2", "--rows", rows, "--json"])["speeds"]
    for name in ("info_cold", "info_warm"):
        found[name] = {k: v for k, v in found[name].items() if k.startswith("process")}
    return found


def plot(found: dict[str, Any], file: Path) -> None:
    """Memory of the reader against the rows that it has read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for name in ("cold", "warm"):
        memory = found[f"read_{name}"]["memory_mb"]
        axes.plot([SAMPLE_EVERY * k for k in range(len(memory))], memory, label=name)
    most = 1.2 * max(found["read_cold"]["memory_mb"])
    axes.set(xlabel="random rows read", ylabel="resident memory, MB", ylim=(0, most))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--canvas", default="800x1344")
    parser.add_argument("--method", default="ld,rm")
    parser.add_argument("--shard-rows", type=int, default=None)
    parser.add_argument("--pool", type=int, default=256)
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--role", choices=ROLES, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        print(json.dumps(ROLES[args.role](args)))
        return
    os.environ["KDCLI_CACHE"] = str(args.out.resolve() / "index")  # the annotations were never parsed
    found = {}
    again = (args.out / "store").is_dir()
    if not again:
        args.out.mkdir(parents=True)  # nobody else's folder: it is deleted
    try:
        if not again:
            found = make(args)
        found |= measure(args)
    finally:
        if not args.keep:
            shutil.rmtree(args.out)
    if args.plot:
        plot(found, args.plot)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
