"""Runs the cases of a kind and writes what came out: a line a case, a line a finding, and a table."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.attack import checkpoints, data, every_byte, images, kills, options, runs, stores
from tests.attack.case import Make, Runner, Scratch
from tests.support.attack import child, tiny
from tests.support.attack.world import World, make_world

DAMAGED: dict[str, Make] = {
    "stores": stores.make, "checkpoints": checkpoints.make, "images": images.make, "data": data.make, "runs": runs.make,
    "options": options.make,
}  # fmt: skip
KINDS = (*DAMAGED, "every-byte", "kills")


def ready(kind: str, out: Path) -> World:
    """The world, and this process ready to fork; kinds have scratch folders of their own and may run side by side."""
    out.mkdir(parents=True, exist_ok=True)
    os.environ["KDCLI_CACHE"] = str(out / "work" / kind / "index")
    child.warm()
    tiny.install()
    world = make_world(out / "world")
    scratch = Scratch(out / "work" / kind / "warm")
    scratch.clear()
    made = scratch.out
    lines = [
        ["cache", "verify", str(world.store)],
        ["cache", "info", str(world.store)],
        ["cache", "show", str(world.store), "1", "--out", str(made / "row.png")],
        ["predict", str(world.teacher_pt), str(world.shapes / "val"), "--out", str(made / "drawn")],
        ["compare", str(world.run), str(world.plain), "--html", str(made / "r.html"), "--plots", str(made / "plots")],
        ["data", "check", str(world.shapes)],
        world.distill(made / "run"),
        world.cache_teacher(made / "store"),
    ]
    child.warm_as(lines, scratch.root / "log")
    scratch.clear()
    return world


def campaign(kind: str, cases: int, seed: int, out: Path) -> int:
    """Cases 0 to ``cases`` that are not in the results yet, of one kind or of ``all``; 1 when anything was found."""
    world = ready(kind, out)
    kinds = KINDS if kind == "all" else (kind,)
    found = [_campaign(name, world, cases, seed, out) for name in kinds]
    print(table(out, kinds))
    return int(any(found))


def _campaign(kind: str, world: World, cases: int, seed: int, out: Path) -> bool:
    """Whether anything was found."""
    results = out / f"{kind}.{seed}.jsonl"
    done = {line["number"] for line in _lines(results)}
    started, ran = time.monotonic(), 0
    with results.open("a") as file:
        for line in _results(kind, world, seed, [n for n in range(cases) if n not in done], out):
            file.write(json.dumps(line) + "\n")
            file.flush()
            ran += 1
            if ran % 50 == 0:
                print(f"{kind}: {ran} cases, {ran / (time.monotonic() - started):.1f} a second", flush=True)
    return any(step["findings"] for line in _lines(results) for step in line["steps"])


def _results(kind: str, world: World, seed: int, numbers: list[int], out: Path) -> Iterator[dict[str, Any]]:
    """A line for each case."""
    scratch = Scratch(out / "work" / kind / "case")
    if kind == "kills":
        killer = kills.Killer(world, scratch)
        for number in numbers:
            yield killer.run(seed, number)
    elif kind == "every-byte":
        store = every_byte.make_store(world, scratch)
        total = len(every_byte.places(store))
        yield from every_byte.attempts(store, seed, [n for n in numbers if n < total], scratch.root / "log")
    else:
        runner = Runner(world, DAMAGED[kind], scratch)
        for number in numbers:
            case, steps = runner.run(kind, seed, number)
            yield {
                "kind": kind, "seed": seed, "number": number, "damage": case.damage,
                "steps": [
                    {"step": s.name, "code": o.code, "seconds": round(o.seconds, 2),
                        "findings": [vars(f) for f in found]}
                    for s, o, found in steps
                ],
            }  # fmt: skip


def only(kind: str, seed: int, number: int, out: Path) -> int:
    """One case again, in words."""
    world = ready(kind, out)
    if kind not in DAMAGED:
        line = next(_results(kind, world, seed, [number], out))
        print(json.dumps(line, indent=1))
        return int(any(step["findings"] for step in line["steps"]))
    runner = Runner(world, DAMAGED[kind], Scratch(out / "work" / kind / "case"))
    case, steps = runner.run(kind, seed, number)
    print(f"{kind} {seed} {number}: {case.damage}; files in {runner.scratch.root}")
    for step, outcome, found in steps:
        print(
            f"\n$ kdcli {' '.join(step.argv)}\nexit code {outcome.code}, {outcome.seconds:.2f} s, expected: {step.expect}"
        )
        print(outcome.err[-3000:])
        for finding in found:
            print(f"FOUND: {finding.problem}")
    return int(any(found for _, _, found in steps))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        for line in path.read_text().splitlines():
            yield json.loads(line)


def table(out: Path, kinds: Sequence[str] = KINDS) -> str:
    """A Markdown row for each kind: inputs, commands run on them, how these ended, what may not happen; then each of that."""
    rows = [
        "| kind | inputs | commands | refused | accepted | tracebacks | hangs, crashes | accepted damage | left over | other |"
    ]
    rows.append(f"|{' --- |' * 10}")
    found: Counter[tuple[str, str, str]] = Counter()
    for kind in kinds:
        count: Counter[str] = Counter()
        for path in sorted(out.glob(f"{kind}.*.jsonl")):
            for line in _lines(path):
                count["inputs"] += bool(line["damage"])
                for step in line["steps"] if line["damage"] else ():
                    count["commands"] += 1
                    count["refused" if step["code"] else "accepted"] += 1
                    for finding in step["findings"]:
                        count[_class(finding["problem"])] += 1
                        found[kind, step["step"], finding["signature"]] += 1
        names = ("inputs", "commands", "refused", "accepted", "traceback", "hang", "silent", "left", "other")
        if count["commands"]:
            rows.append(f"| {' | '.join([kind, *(f'{count[name]:,}' for name in names)])} |")
    rows += [
        "",
        *(f"{n} x {kind} / {step}: {what}" for (kind, step, what), n in sorted(found.items(), key=lambda x: -x[1])),
    ]
    return "\n".join(rows)


def _class(problem: str) -> str:
    """The column of a problem."""
    starts = {
        "traceback": "traceback", "exit code": "traceback", "hang": "hang", "crash": "hang", "accepted": "silent",
        "left over": "left",
        "code of": "silent",
    }  # fmt: skip
    return next((column for start, column in starts.items() if problem.startswith(start)), "other")
