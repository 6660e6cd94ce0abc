"""What a training step costs: plain, from a store, with the same loss fed from memory, and with a live teacher.

Everything runs in one process, method by method; within a method the variants take a few steps in turn on the same batches,
so that a noisy machine disturbs them alike. Prints one JSON object: each ratio, its limit, and whether it was met.
docs/results/costs.md says what the ratios mean. Peak memory is measured in one process per variant.

    python benchmarks/step_cost.py [--data DATA --teacher RUN] --out FOLDER [--methods ld rm ld,pfi ...]

Without --data it draws a data set, without --teacher it makes a random one (``--teacher-model gfl_resnet50``).
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import draw_data, machine, pairwise, part_of, plan_of, random_teacher, verdict

from kdcli.detectors.weights import load_detector
from kdcli.engine.caching.plan import StorePlan
from kdcli.engine.caching.write import write_store
from kdcli.engine.loading.loader import Loader
from kdcli.engine.loading.samples import Item
from kdcli.engine.runtime.memory import keep_freed_memory, peak_memory_bytes, reset_peak_memory
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training import run_config
from kdcli.engine.training.setup import prepare
from kdcli.engine.training.trainer import Trainer
from kdcli.structures import Batch
from kdcli.tensors import Tensors

METHODS = (
    "ld", "rm", "pfi", "bckd", "defeat", "defeat_thin", "drkd", "drkd_lite", "cwd", "pkd", "fgd", "ld,pfi", "ld,rm,pfi",
)  # fmt: skip
LIVE = ("ld", "pfi")  # that are run with a live teacher too
SPARSE = ("ld", "rm", "defeat_thin", "drkd_lite")
STUDENT = ("gfl_mobilenet_v3_small", 64, 4)  # that the limits against plain training are for
PLAIN_LIMITS = {"ld": 1.10, "rm": 1.10, "bckd": 1.15, "pfi": 1.15, "defeat": 1.25}
MEMORY_LIMIT = 1.05  # a step from the store over the same loss fed from memory
LIVE_LIMIT = 1.05  # a step from the store over a live step less the teacher's forward pass
PEAK_LIMIT = 1.10  # of a sparse method over plain
WAIT_LIMIT = 3.0  # percent
PAYBACK_LIMIT, PAYBACK_FROM = 2.5, 0.42  # epochs; where the forward pass takes this part of a student step
SPEEDUP_LIMIT = 4.0  # of a ResNet-50 teacher
AHEAD = 4  # batches that a data worker makes ahead (kdcli.engine.loading.loader)

Step = Callable[[], float]  # takes one step, returns the seconds that it waited for data


def make_trainer(args: argparse.Namespace, method: str, store: Path | None) -> Trainer:
    """A run of one variant; nothing is written. ``store``: None for a live teacher."""
    side: dict[str, Any] = {"cache": str(store)} if store else {"teacher": args.teacher}
    fields = {
        "data": args.data, "canvas": args.canvas, "epochs": 1000, "batch": args.batch, "amp": args.amp,
        "workers": args.workers, "model": {"name": args.model, "fpn_channels": args.channels, "tower_convs": args.towers},
        **({"method": method, **side} if method else {}),
    }  # fmt: skip
    request = run_config.from_flags("distill" if method else "train", fields, {}, None, {})
    return Trainer(prepare(request.options(), frozenset(fields), NullReporter()), Path(), NullReporter())


def from_memory(trainer: Trainer) -> tuple[Trainer, dict[str, Any]]:
    """The same run without its store: images as ever, but entries and float32 teacher tensors lie in memory.

    What is left out is all that a store costs: reading, checking and decompressing in the data workers, the travel of the
    arrays to this process, and their decoding on the device.
    """
    setup = trainer.setup
    assert setup.teacher is not None
    kept: dict[str, tuple[Any, Tensors]] = {}
    for batch in Loader(setup.source, 0).batches(batches_of(trainer)):
        kept[str(batch.keys)] = (batch.entries, setup.teacher.forward(batch.to(trainer.device)))
    source = replace(setup.source, reader=None, row_definition=None, regions=frozenset())
    teacher = replace(setup.teacher, forward=lambda batch: kept[str(batch.keys)][1], source=source)
    again = Trainer(replace(setup, source=source, teacher=teacher), Path(), NullReporter())
    return again, {keys: entries for keys, (entries, _) in kept.items()}


def batches_of(trainer: Trainer) -> list[list[Item]]:
    """The whole batches of the first epoch: every variant goes through the same ones, over and over."""
    whole = [b for b in trainer._plan(0) if len(b) == trainer.options.batch]
    if not whole:
        raise SystemExit("no whole batch of one orientation: take more --images or a smaller --batch")
    return whole


def stepper(trainer: Trainer, entries: dict[str, Any] | None = None) -> Step:
    """Takes one training step at each call, data waits included. ``entries``: of ``from_memory``."""
    plan = batches_of(trainer)
    loader = Loader(trainer.setup.source, trainer.setup.workers)
    batches: Iterator[Batch] = loader.batches(plan * 1000)  # one long epoch: a new one begins with empty queues

    def step() -> float:
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        if entries is not None:
            batch = replace(batch, entries=entries[str(batch.keys)])
        trainer.state.batch = 1  # the gradient shares are measured once an epoch, not in a usual step
        trainer._train_batch(batch, len(plan))
        trainer.state.step += 1
        return waited

    return step


def timed(trainer: Trainer, spent: list[float]) -> Trainer:
    """The same run; the seconds of its teacher's pass and of picking what the losses read are added to ``spent``.

    Timed where it happens, beside the data workers and in the memory of a training step: alone it takes another time.
    """
    setup = trainer.setup
    assert setup.teacher is not None
    real = setup.teacher.forward

    def wait() -> None:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)

    def forward(batch: Batch) -> Tensors:
        wait()
        started = time.perf_counter()
        found = real(batch)
        wait()
        spent.append(time.perf_counter() - started)
        return found

    return Trainer(replace(setup, teacher=replace(setup.teacher, forward=forward)), Path(), NullReporter())


def seconds_of(step: Step, count: int, device: torch.device) -> tuple[float, float]:
    """Seconds of ``count`` steps, and of them those that waited for data."""
    started = time.perf_counter()
    waited = sum(step() for _ in range(count))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, waited


def compare(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """All variants of one method, interleaved."""
    store = args.out / "stores" / method.replace(",", "+")
    plan = planned(args, method)
    write_s = [child(args, f"write {method}")["seconds"]]
    cached = make_trainer(args, method, store)
    memory, entries = from_memory(make_trainer(args, method, store))
    spent: list[float] = []
    steps = {
        "plain": stepper(make_trainer(args, "", None)),
        "cached": stepper(cached),
        "memory": stepper(memory, entries),
    }
    if method in LIVE:
        steps["live"] = stepper(timed(make_trainer(args, method, None), spent))
    for step in steps.values():  # not counted: the first steps of a process are slower
        seconds_of(step, args.steps, cached.device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    if method in LIVE:
        seconds["forward"] = []
    for number in range(args.rounds):
        order = list(steps) if number % 2 == 0 else list(steps)[::-1]
        for name in order:
            spent.clear()
            seconds[name].append(seconds_of(steps[name], args.steps, cached.device)[0] / args.steps)
            if name == "live":
                seconds["forward"].append(sum(spent) / args.steps)
    found = {"step_ms": {n: round(1000 * statistics.median(v), 1) for n, v in seconds.items()}}
    found |= ratios(args, method, seconds)
    # one long run: between short turns the workers would fill their queues, and nothing were waited for
    seconds_of(steps["cached"], AHEAD * max(1, args.workers), cached.device)
    total, waited = seconds_of(steps["cached"], args.wait_steps, cached.device)
    found["data_wait_percent"] = verdict(100 * waited / total, WAIT_LIMIT)
    if method in LIVE:
        steps.clear()
        write_s.append(child(args, f"write {method}")["seconds"])
        found["payback"] = payback(plan, seconds, statistics.mean(write_s), args.batch)
    return found


def planned(args: argparse.Namespace, method: str) -> StorePlan:
    """The plan of a store without a val split: the teacher's AP, which a store keeps, is not what is measured here."""
    return plan_of(part_of(args.data, args.out, 0, val=False), args.teacher, method, args.canvas, None)


def write(plan: StorePlan, store: Path) -> float:
    """Seconds to cache two views of every image into a fresh store."""
    shutil.rmtree(store, ignore_errors=True)
    plan.source.load(plan.item(0))
    plan.teacher.forward.outputs(
        torch.zeros(1, 3, *plan.source.canvas.size, dtype=torch.uint8, device=plan.teacher.device)
    )
    started = time.perf_counter()
    write_store(plan, store, NullReporter())
    return time.perf_counter() - started


def ratios(args: argparse.Namespace, method: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The ratios of one method with their limits."""
    usual = (args.model, args.channels, args.towers) == STUDENT
    found = {
        "cached_over_plain": pairwise(seconds["cached"], seconds["plain"], PLAIN_LIMITS.get(method) if usual else None),
        "cached_over_memory": pairwise(seconds["cached"], seconds["memory"], MEMORY_LIMIT),
        "memory_over_plain": pairwise(seconds["memory"], seconds["plain"], None),
    }
    if "live" in seconds:
        rest = [live - forward for live, forward in zip(seconds["live"], seconds["forward"], strict=True)]
        heavy = usual and args.amp == "fp32" and args.teacher_model == "gfl_resnet50"
        least = SPEEDUP_LIMIT if heavy else None
        found |= {
            "cached_over_live_less_forward": pairwise(seconds["cached"], rest, LIVE_LIMIT),
            "live_over_plain": pairwise(seconds["live"], seconds["plain"], None),
            "live_over_cached": pairwise(seconds["live"], seconds["cached"], least, least=True),
        }
    return found


def payback(plan: StorePlan, seconds: dict[str, list[float]], write_s: float, batch: int) -> dict[str, Any]:
    """After how many epochs two cached views have cost less than a live teacher; null where a step from the store was not
    faster (tiny images on a busy machine), so that it never pays back."""
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    images = len(plan.positions)
    saved = (middle["live"] - middle["cached"]) * images / batch
    part = middle["forward"] / middle["plain"]
    limit = PAYBACK_LIMIT if part >= PAYBACK_FROM else None
    never = {"value": None} if limit is None else {"value": None, "limit": limit, "met": False}
    return {
        "epochs": verdict(write_s / saved, limit) if saved > 0 else never,
        "forward_over_student_step": round(part, 3),
        "write_s": round(write_s, 2),
        "saved_s_an_epoch": round(saved, 6),
        "write_images_per_s": round(plan.schema.rows / write_s, 1),
    }


def peaks(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory over plain, each variant in a process of its own."""
    names = [("plain", ""), *((f"cached {m}", m) for m in args.methods)]
    names += [(f"live {m}", m) for m in args.methods if m in LIVE]
    found = {name: int(child(args, name)["peak"]) for name, _ in names}
    return {
        name: {"mb": round(found[name] / 2**20), **verdict(found[name] / found["plain"], limit_of(name, method))}
        for name, method in names
    }


def limit_of(name: str, method: str) -> float | None:
    """The most memory that a variant may take, times plain."""
    return PEAK_LIMIT if name.startswith("cached") and set(method.split(",")) <= set(SPARSE) else None


def child(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """What ``only`` prints of one variant, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--data", args.data, "--teacher", args.teacher]
    command += ["--out", str(args.out)]
    printed: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return printed


def only(args: argparse.Namespace) -> None:
    """Print the peak memory of one variant, or the seconds that writing its store takes as the command writes it."""
    reset_peak_memory(torch.device("cpu"))  # a child starts with its parent's peak
    kind, _, method = args.only.partition(" ")
    store = args.out / "stores" / method.replace(",", "+")
    if kind == "write":
        plan = planned(args, method)
        keep_freed_memory(plan.teacher.device)
        print(json.dumps({"seconds": write(plan, store)}))
        return
    trainer = make_trainer(args, method, None if kind == "live" else store)
    seconds_of(stepper(trainer), 10, trainer.device)
    print(json.dumps({"peak": peak_memory_bytes(trainer.device)}))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="")
    parser.add_argument("--teacher", default="")
    parser.add_argument("--teacher-model", default="gfl_mobilenet_v2", help="of the random one")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "kdcli-step-cost")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--images", type=int, default=64, help="training images that are used; 0: all")
    parser.add_argument("--model", default=STUDENT[0])
    parser.add_argument("--channels", type=int, default=STUDENT[1])
    parser.add_argument("--towers", type=int, default=STUDENT[2])
    parser.add_argument("--canvas", default="256x320")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--amp", default="fp32")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3, help="of a variant at a time")
    parser.add_argument(
        "--wait-steps", type=int, default=32, help="of the run in which the waits for data are measured"
    )
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        only(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.data:
        args.data = draw_data(args.out, args.images)
    if not args.teacher:
        channels = 256 if "resnet" in args.teacher_model else 128
        args.teacher = random_teacher(args.out, args.data, args.teacher_model, channels, args.canvas)
    args.teacher_model = load_detector(args.teacher)[0].spec.name
    args.data = part_of(args.data, args.out, args.images, val=True)
    found = {method: compare(args, method) for method in args.methods}
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "data", "teacher", "methods", "only")}
    print(json.dumps({"methods": found, "peak": peaks(args), "settings": settings, **machine()}, indent=1))


if __name__ == "__main__":
    main()
