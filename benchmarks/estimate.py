"""How far ``cache-teacher --estimate`` is from the store that is then written: bytes and seconds, in one process.

For each data set and method: the estimate, then the real write, in a folder that is gone afterwards. Prints one JSON object;
``predicted / actual`` may be 0.90 to 1.10 for bytes and 0.75 to 1.25 for seconds.

    python benchmarks/estimate.py --data DATA[=TEACHER] [DATA[=TEACHER] ...] [--method ld ld,rm,pfi bckd] [--table FILE]

Without a teacher it makes one with random weights. On a machine that other work runs on, seconds say nothing: ``--clock
processor`` takes one core, loads images in the same process, and counts the seconds that the processor worked for it.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from common import machine, plan_of, random_teacher

from kdcli.engine.caching.estimate import probe as probe_module
from kdcli.engine.caching.estimate.estimate import estimate
from kdcli.engine.caching.write import write_store
from kdcli.engine.runtime.memory import keep_freed_memory
from kdcli.engine.runtime.progress import NullReporter
from kdcli.files import atomic_write_text
from kdcli.store.info import store_info

METHODS = ("ld", "ld,rm,pfi", "bckd")
LIMITS = {"bytes": 0.10, "seconds": 0.25}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def measure(args: argparse.Namespace, data: str, teacher: str, method: str, scratch: Path) -> dict[str, Any]:
    """Estimate and write, ``rounds`` times."""
    clock = CLOCKS[args.clock]
    plan = plan_of(data, teacher, method, args.canvas, 0 if args.clock == "processor" else args.workers)
    keep_freed_memory(plan.teacher.device)  # as the command does
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        out = scratch / f"store-{number}"
        started = clock()
        found = estimate(plan, out)
        estimated = clock()
        write_store(plan, out, NullReporter())
        written = clock() - estimated
        real = store_info(out)
        by_array = {
            path: found.bytes_by_array[path] / size
            for path, size in real["bytes_by_array"].items()
            if size > 0.01 * real["bytes"]
        }
        rounds.append(
            {
                "estimate_s": estimated - started,
                "bytes": {"predicted": found.bytes_total, "actual": real["bytes"], "worst_array": _worst(by_array)},
                "seconds": {"predicted": found.seconds, "actual": written},
                "slowest": found.slowest,
                "break_even_epochs": found.break_even.epochs,
                "load": round(os.getloadavg()[0], 1),
            }
        )
    result: dict[str, Any] = {"rows": found.rows, "probed_rows": found.probed_rows, "rounds": rounds}
    for what, limit in LIMITS.items():
        ratios = [r[what]["predicted"] / r[what]["actual"] for r in rounds]
        within = sum(abs(r - 1) <= limit for r in ratios)
        print(f"{Path(data).name} {method}: {what} {ratios}", file=sys.stderr)
        result[what] = {"ratios": [round(r, 3) for r in ratios], "within": f"{within} of {len(ratios)}"}
    return result


def _worst(ratios: dict[str, float]) -> dict[str, Any]:
    path = max(ratios, key=lambda p: abs(ratios[p] - 1))
    return {"path": path, "ratio": round(ratios[path], 3)}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown, one line for each data set and method; medians over the rounds."""
    lines = [
        "| data | method | rows | MB | predicted / actual | seconds | predicted / actual | estimate | break-even |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in found.items():
        data, method = name.rsplit(" ", 1)
        rounds = one["rounds"]
        seconds = statistics.median(r["seconds"]["actual"] for r in rounds)
        lines.append(
            f"| {data} | `{method}` | {one['rows']} | {rounds[0]['bytes']['actual'] / 1e6:.1f} "
            f"| {', '.join(f'{r:.2f}' for r in one['bytes']['ratios'])} | {seconds:.1f} "
            f"| {', '.join(f'{r:.2f}' for r in one['seconds']['ratios'])} "
            f"| {statistics.median(r['estimate_s'] for r in rounds):.1f} s "
            f"| {statistics.median(r['break_even_epochs'] for r in rounds):.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="DATA[=TEACHER]")
    parser.add_argument("--method", nargs="+", default=list(METHODS))
    parser.add_argument("--canvas", default="256x320")
    parser.add_argument("--model", default="gfl_mobilenet_v2", help="of a teacher with random weights")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    if args.clock == "processor":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        args.threads = 1
        clocks: Any = SimpleNamespace(perf_counter=time.process_time, process_time=time.process_time)
        patch.object(probe_module, "time", clocks).start()
    if args.threads:
        torch.set_num_threads(args.threads)
    found = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for one in args.data:
            data, _, teacher = one.partition("=")
            teacher = teacher or random_teacher(Path(folder), data, args.model, args.channels, args.canvas)
            for method in args.method:
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    found[f"{Path(data).name} {method}"] = measure(args, data, teacher, method, Path(scratch))
    if args.table:
        atomic_write_text(args.table, table(found))
    print(json.dumps({"found": found, "clock": args.clock, "canvas": args.canvas, **machine()}, indent=1))


if __name__ == "__main__":
    main()
