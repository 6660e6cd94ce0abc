"""What a training step costs: plain, from a store, and with a live teacher, in one process and interleaved.

Prints one JSON object. Ratios are medians over rounds in which every variant takes a few steps in turn, so that a noisy
machine disturbs them alike; the absolute times are this machine's. Peak memory is measured in one process per variant.

    python benchmarks/step_cost.py --data DATA --teacher RUN --out FOLDER [--model gfl_shufflenet_v2_x0_5 ...]

Without --data it draws a data set and makes a random teacher.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kdcli.data.shapes import CLASSES, make_shapes
from kdcli.detectors.build import ModelSpec, build_detector
from kdcli.detectors.weights import export, load_detector
from kdcli.engine import launch
from kdcli.engine.caching import plan_store
from kdcli.engine.devices import peak_memory_bytes, reset_peak_memory
from kdcli.engine.prepare import prepare
from kdcli.engine.runs import hardware
from kdcli.engine.samples import Loader
from kdcli.engine.train import Trainer
from kdcli.engine.watch import Silent
from kdcli.engine.writing import write_store
from kdcli.files import atomic_save
from kdcli.options import CacheOptions
from kdcli.structures import Batch

METHODS = ("ld", "rm", "pfi", "ld,pfi", "ld,rm,pfi")


def make_trainer(args: argparse.Namespace, method: str, live: bool, store: Path) -> Trainer:
    """A run of one variant; nothing is written."""
    side: dict[str, Any] = {"teacher": args.teacher} if live else {"cache": str(store)}
    fields = {
        "data": args.data, "canvas": args.canvas, "epochs": 1000, "batch": args.batch, "amp": args.amp,
        "workers": 1, "model": {"name": args.model, "fpn_channels": args.channels, "tower_convs": args.towers},
        **({"method": method, **side} if method else {}),
    }  # fmt: skip
    asked = launch.from_flags("distill" if method else "train", fields, {}, None, {})
    return Trainer(prepare(asked.options(), frozenset(fields), Silent()), Path(), Silent())


def endless(trainer: Trainer) -> Iterator[tuple[Batch, int]]:
    """Batches of epoch after epoch."""
    loader = Loader(trainer.prepared.source, trainer.prepared.workers)
    for epoch in itertools.count():
        plan = trainer._plan(epoch)
        for batch in loader.batches(plan):
            yield batch, len(plan)


def steps(trainer: Trainer, batches: Iterator[tuple[Batch, int]], count: int) -> float:
    """Seconds for ``count`` steps, waiting for data included."""
    started = time.perf_counter()
    for batch, length in itertools.islice(batches, count):
        trainer.progress.batch = 1  # the gradient shares are measured once an epoch, not in a usual step
        trainer._train_batch(batch, length)
        trainer.progress.step += 1
    return time.perf_counter() - started


def variants() -> list[tuple[str, str, bool]]:
    """Name, methods, live."""
    cached = [(f"cached {m}", m, False) for m in METHODS]
    return [("plain", "", False), *cached, ("live ld", "ld", True), ("live pfi", "pfi", True)]


def memory_of(args: argparse.Namespace, name: str) -> int:
    """Peak memory of one variant in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--data", args.data, "--teacher", args.teacher]
    command += ["--out", str(args.out)]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["peak"])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="")
    parser.add_argument("--teacher", default="")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "kdcli-step-cost")
    parser.add_argument("--model", default="gfl_shufflenet_v2_x0_5")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--towers", type=int, default=2)
    parser.add_argument("--canvas", default="256x320")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--amp", default="fp32")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.data:
        args.data, args.teacher = draw(args.out, args.canvas)
    store = args.out / "store"
    if args.only:
        only(args, store)
        return
    write_store(
        plan_store(CacheOptions(data=args.data, teacher=args.teacher, method="ld,rm,pfi", canvas=args.canvas), Silent()),
        store, Silent(),
    )  # fmt: skip
    running = {}
    for name, method, live in variants():
        trainer = make_trainer(args, method, live, store)
        running[name] = (trainer, endless(trainer))
        steps(*running[name], args.steps)  # not counted: the first steps of a process are slower
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(args.rounds):
        for name, parts in running.items():
            seconds[name].append(steps(*parts, args.steps) / args.steps)
    ratio = {
        name: statistics.median(a / b for a, b in zip(values, seconds["plain"], strict=True))
        for name, values in seconds.items()
    }
    memory = {name: memory_of(args, name) for name in seconds}
    print(
        json.dumps(
            {
                "step_ms": {n: 1000 * statistics.median(v) for n, v in seconds.items()},
                "step_over_plain": ratio,
                "peak_mb": {n: m / 2**20 for n, m in memory.items()},
                "peak_over_plain": {n: m / memory["plain"] for n, m in memory.items()},
                "settings": {
                    k: v
                    for k, v in vars(args).items()
                    if k in ("model", "channels", "towers", "canvas", "batch", "amp")
                },
                "hardware": hardware(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            },
            indent=1,
        )
    )


def only(args: argparse.Namespace, store: Path) -> None:
    """Print the peak memory of one variant."""
    reset_peak_memory(torch.device("cpu"))  # a child starts with its parent's peak
    _, method, live = next(v for v in variants() if v[0] == args.only)
    trainer = make_trainer(args, method, live, store)
    steps(trainer, endless(trainer), 10)
    print(json.dumps({"peak": peak_memory_bytes(trainer.device)}))


def draw(out: Path, canvas: str) -> tuple[str, str]:
    """A drawn data set and a random teacher of usual size."""
    make_shapes(out / "shapes", num_train=64, num_val=8)
    file = out / "teacher.pt"
    torch.manual_seed(0)
    spec = ModelSpec("gfl", "mobilenet_v2", len(CLASSES), fpn_channels=128)
    classes = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    atomic_save(export(build_detector(spec), classes, canvas, {}), file)
    load_detector(file)
    return str(out / "shapes"), str(file)


if __name__ == "__main__":
    main()
