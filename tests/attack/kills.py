"""kill -9 at a drawn moment of every command that writes; then the same command, or --resume, ends as if nothing had been."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.attack.case import Scratch
from tests.support.attack import child, contents
from tests.support.attack.child import Outcome
from tests.support.attack.judge import LEFT, problems_of, signature, snapshot
from tests.support.attack.world import HERE, World

TRIES = 4  # until a kill comes before the end of its command
PAUSE = 0.002  # seconds before each change of the file system on a slow disk
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}


@dataclass(frozen=True)
class Writing:
    """A command that writes. again: what goes on with it after a kill; without one it is the same command.

    refused: after a kill behind its last write the command may say that all is done: the exit code of that.
    """

    name: str
    prepare: Callable[[World, Scratch], None]
    argv: Callable[[World, Scratch], list[str]]
    again: Callable[[World, Scratch], list[str]] | None = None
    refused: int = 0


def _copy(name: str, to: str) -> Callable[[World, Scratch], None]:
    def prepare(world: World, scratch: Scratch) -> None:
        shutil.copytree(world.root / name, scratch.root / to)

    return prepare


def _nothing(world: World, scratch: Scratch) -> None:
    """Nothing has to be there."""


def _resumed(command: str) -> Callable[[World, Scratch], list[str]]:
    """``--resume`` where there is a run, else the command from the start."""

    def argv(world: World, scratch: Scratch) -> list[str]:
        run = scratch.out / "run"
        if (run / "config.toml").is_file():
            return [command, "--resume", str(run)]
        return world.train(run) if command == "train" else world.distill(run, epochs=2)

    return argv


COMMANDS: tuple[Writing, ...] = (
    Writing("cache-teacher", _nothing, lambda w, s: w.cache_teacher(s.out / "store")),
    Writing("cache add", _copy("store_ld", "in/store"), lambda w, s: ["cache", "add", str(s.into / "store"),
        "--method", "pfi"]),
    Writing("cache add --cache-images", _copy("store_ld", "in/store"), lambda w, s: ["cache", "add",
        str(s.into / "store"), "--cache-images"]),
    Writing(
        "cache prune --tensor", _copy("store", "in/store"),
        lambda w, s: ["cache", "prune", str(s.into / "store"), "--tensor", "features@all"], refused=3,
    ),
    Writing(
        "cache prune --view", _nothing,
        lambda w, s: ["cache", "prune", str(w.store), "--view", "hflip", "--out", str(s.out / "store")],
    ),
    Writing(
        "cache merge", _nothing,
        lambda w, s: ["cache", "merge", str(w.store_identity), str(w.store_hflip), "--out", str(s.out / "store")],
    ),
    Writing("train", _nothing, lambda w, s: w.train(s.out / "run"), _resumed("train")),
    Writing("distill", _nothing, lambda w, s: w.distill(s.out / "run", epochs=2), _resumed("distill")),
    Writing("distill --resume", _copy("stopped", "in/run"), lambda w, s: ["distill", "--resume", str(s.into / "run")]),
    Writing("train --overwrite", _copy("plain", "out/run"), lambda w, s: [*w.train(s.out / "run"), "--overwrite"]),
    Writing("train --seeds", _nothing, lambda w, s: [*w.train(s.out / "queue"), "--seeds", "0,1"]),
    Writing(
        "convert", _nothing,
        lambda w, s: ["convert", str(w.root / "mmdet.pth"), "--from", "mmdet", "--out", str(s.out / "c.pt")], refused=3,
    ),
    Writing(
        "eval", _nothing,
        lambda w, s: ["eval", str(w.teacher_pt), "--data", str(w.shapes), "--out", str(s.out / "scores"), *HERE[:2]],
    ),
    Writing("predict", _nothing, lambda w, s: ["predict", str(w.teacher_pt), str(w.shapes / "train"), "--out",
        str(s.out / "drawn")]),
    Writing(
        "compare", _nothing,
        lambda w, s: ["compare", str(w.run), str(w.plain), "--html", str(s.out / "r.html"), "--plots",
            str(s.out / "plots")],
    ),
    Writing("cache show", _nothing, lambda w, s: ["cache", "show", str(w.store), "1", "--out", str(s.out / "row.png")]),
    Writing("data make-shapes", _nothing, lambda w, s: ["data", "make-shapes", str(s.out / "shapes"), "--train", "6",
        "--val", "3"]),
    Writing("cache-teacher --estimate", _nothing, lambda w, s: [*w.cache_teacher(s.out / "store"), "--estimate"]),
)  # fmt: skip

Files = dict[str, str]


@dataclass
class Killer:
    """Kills commands in one scratch folder."""

    world: World
    scratch: Scratch
    right: dict[str, Files] = field(default_factory=dict)  # by command what it leaves, "" for what differs each time
    seconds: dict[tuple[str, bool], float] = field(default_factory=dict)  # by command and kind of disk

    def run(self, seed: int, number: int) -> dict[str, Any]:
        """Kill command ``number`` of the rotation once, every other round on a slow disk; what became of it."""
        writing = COMMANDS[number % len(COMMANDS)]
        rng = Random(f"kills/{seed}/{number}")
        slow = number // len(COMMANDS) % 2 == 1
        if writing.name not in self.right:
            self.right[writing.name] = self._uninterrupted(writing)
        if (writing.name, slow) not in self.seconds:
            self.seconds[writing.name, slow] = self._child(writing, slow, None).seconds
        seconds = self.seconds[writing.name, slow]
        for _ in range(TRIES):
            delay = rng.uniform(0.4 * rng.randint(0, 1), 1) * seconds
            died = self._child(writing, slow, delay)
            if died.code == -signal.SIGKILL:
                break
        else:
            return self._line(seed, number, writing, "", died, [])
        damage = f"{writing.name} killed after {delay:.3f} of {seconds:.3f} s{' on a slow disk' if slow else ''}"
        argv = (writing.again or writing.argv)(self.world, self.scratch)
        before = sorted(snapshot(self.scratch.out)), sorted(snapshot(self.scratch.into))
        outcome = child.run(argv, self.scratch.root / "log", self.scratch.out)
        problems = problems_of(outcome)
        found, wanted = self._files(), self.right[writing.name]
        missing, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        other = sorted(k for k in wanted.keys() & found.keys() if wanted[k] and wanted[k] != found[k])
        if outcome.code not in (0, writing.refused) or (outcome.code and (missing or more or other)):
            problems.append(f"not recovered: exit code {outcome.code}")
        problems += [f"left over: {', '.join(more[:3])}"] if more else []
        problems += [f"missing: {', '.join(missing[:3])}"] if missing and not outcome.code else []
        problems += [f"another result: {', '.join(other[:3])}"] if other and not outcome.code else []
        tail = f"{outcome.err[-600:]}\nafter the kill: {before}"[:3000]
        findings = [
            {"problem": p, "step": writing.name, "argv": argv, "tail": tail, "signature": _kind(outcome, p)}
            for p in problems
        ]
        return self._line(seed, number, writing, damage, outcome, findings)

    def _line(
        self, seed: int, number: int, writing: Writing, damage: str, outcome: Outcome, findings: list[dict[str, Any]]
    ) -> dict[str, Any]:
        step = {"step": writing.name, "code": outcome.code, "seconds": round(outcome.seconds, 2), "findings": findings}
        return {"kind": "kills", "seed": seed, "number": number, "damage": damage, "steps": [step]}

    def _fresh(self, writing: Writing) -> None:
        self.scratch.clear()
        os.environ["TMPDIR"] = str(self.scratch.root / "tmp")
        os.environ["KDCLI_CACHE"] = str(self.scratch.root / "index")
        writing.prepare(self.world, self.scratch)

    def _uninterrupted(self, writing: Writing) -> Files:
        runs = []
        for _ in range(2):
            found = self._child(writing, False, None)
            assert found.code == 0, (writing.name, found.err)
            runs.append(self._files())
        assert runs[0].keys() == runs[1].keys(), writing.name
        assert not [name for name in runs[0] if LEFT.match(Path(name).name)], writing.name
        return {k: v if runs[1][k] == v else "" for k, v in runs[0].items()}

    def _child(self, writing: Writing, slow: bool, delay: float | None) -> Outcome:
        """Run the command from the start, and kill it after ``delay`` seconds."""
        self._fresh(writing)
        out, err = self.scratch.root / "log" / "stdout", self.scratch.root / "log" / "stderr"
        argv, place = writing.argv(self.world, self.scratch), self.scratch.out

        def work() -> int:
            os.chdir(place)
            if slow:
                sys.addaudithook(_wait_before)
            return child.command(argv)

        started = time.monotonic()
        pid = child.fork(work, out, err)
        if delay is not None:
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # it may not have made its group yet
        return child.wait(pid, out, err, started)

    def _files(self) -> Files:
        """What lies in the scratch folder but for logs; of results.csv what no clock decides."""
        found: Files = {}
        for name in ("in", "out", "index"):
            folder = self.scratch.root / name
            found |= {
                f"{name}/{k}": v for k, v in snapshot(folder).items() if name != "index" or LEFT.match(Path(k).name)
            }
        for name in [k for k in found if k.endswith("results.csv")]:
            found[name] = contents.losses(self.scratch.root / name)
        for name in [k for k in found if k.endswith("env.json")]:
            found[name] = contents.environment(self.scratch.root / name)
        for name in [k for k in found if k.endswith(".pt") and not LEFT.match(Path(k).name)]:
            found[name] = contents.checkpoint(self.scratch.root / name)
        return found


def _wait_before(event: str, arguments: tuple[Any, ...]) -> None:
    """A hook that Python calls before it changes the file system: a kill by the clock then comes between two changes."""
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event in CHANGES:
        time.sleep(PAUSE)


def _kind(outcome: Outcome, problem: str) -> str:
    """What tells one root cause from another: process ids, drawn names and what lies below the first path do not."""
    if problem == "traceback":
        return signature(outcome, problem)
    return re.sub(r"\d+", "N", re.sub(r"-probe-\w+", "-probe-N", problem)).partition(",")[0]
