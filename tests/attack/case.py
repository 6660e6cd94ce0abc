"""A damaged input, the commands that read it, and the judgement of each."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.support.attack import child, contents
from tests.support.attack.child import Outcome
from tests.support.attack.judge import leftovers, problems_of, signature, snapshot, unfinished
from tests.support.attack.world import World

USUAL = "groupnorm"  # in a warning that each command here gives: a head of 4 channels
CANARY = "canary"  # a file that appears in the scratch folder when code of an input ran


@dataclass(frozen=True)
class Scratch:
    """The folder of one case: what is damaged lies in ``into``, what commands make in ``out``."""

    root: Path

    @property
    def into(self) -> Path:
        """Damaged inputs."""
        return self.root / "in"

    @property
    def out(self) -> Path:
        """Outputs, empty before each command."""
        return self.root / "out"

    def clear(self) -> None:
        """Empty folders; temporary files of the commands go to ``tmp``."""
        shutil.rmtree(self.root, ignore_errors=True)
        for name in ("in", "out", "tmp", "log"):
            (self.root / name).mkdir(parents=True)

    def clear_out(self) -> None:
        """An empty ``out``."""
        shutil.rmtree(self.out)
        self.out.mkdir()


@dataclass(frozen=True)
class Step:
    """A command at the damaged input.

    expect: what exit code 0 has to mean. ``same``: the result of the undamaged input. ``refuse``: it may not succeed.
    ``warned``: it has to print a warning. ``left out``: `compare --json` names a run that takes no part. ``any``: the damage
    made another input that is as good as the first.
    result: what came out, as text, where ``same`` is expected. settle: a command that must then refuse what came out, if it
    is not the same: damage that is carried on and still found was not accepted. in_place: it may write to its input.
    """

    name: str
    argv: list[str]
    expect: str = "any"
    result: Callable[[Scratch, Outcome], str] | None = None
    settle: list[str] | None = None
    in_place: bool = False


@dataclass(frozen=True)
class Case:
    """A damaged input and the commands that read it; ``damage`` says what was done, in words."""

    damage: str
    steps: list[Step]


Make = Callable[[World, Random, int, Scratch, bool], Case]  # world, generator, number, scratch, whether to damage


@dataclass(frozen=True)
class Finding:
    """Something that may not happen."""

    problem: str
    step: str
    argv: list[str]
    tail: str
    signature: str


@dataclass
class Runner:
    """Runs the cases of a kind in one scratch folder; results of undamaged inputs are kept by the name of the step."""

    world: World
    make: Make
    scratch: Scratch
    right: dict[str, str] = field(default_factory=dict)

    def run(self, kind: str, seed: int, number: int) -> tuple[Case, list[tuple[Step, Outcome, list[Finding]]]]:
        """Run case ``number``; of each command how it ended and what is wrong with that."""
        self.scratch.clear()
        os.environ["TMPDIR"] = str(self.scratch.root / "tmp")
        case = self.make(self.world, Random(f"{kind}/{seed}/{number}"), number, self.scratch, True)
        missing = [s.name for s in case.steps if s.expect == "same" and s.name not in self.right]
        if missing:
            self._undamaged(kind, seed, number, missing)
            self.scratch.clear()
            case = self.make(self.world, Random(f"{kind}/{seed}/{number}"), number, self.scratch, True)
        if not case.damage:
            return case, []
        return case, [(step, *self._step(step)) for step in case.steps]

    def _undamaged(self, kind: str, seed: int, number: int, names: list[str]) -> None:
        for name in names:
            self.scratch.clear()
            case = self.make(self.world, Random(f"{kind}/{seed}/{number}"), number, self.scratch, False)
            step = next(s for s in case.steps if s.name == name)
            outcome = child.run(step.argv, self.scratch.root / "log", self.scratch.out)
            assert outcome.code == 0, (step.argv, outcome.err)
            assert step.result is not None
            self.right[name] = step.result(self.scratch, outcome)

    def _step(self, step: Step) -> tuple[Outcome, list[Finding]]:
        scratch = self.scratch
        scratch.clear_out()
        before = snapshot(scratch.into)
        outcome = child.run(step.argv, scratch.root / "log", scratch.out)
        problems = problems_of(outcome)
        after = snapshot(scratch.into)
        if not step.in_place and after != before:
            changed = sorted(k for k in {*before, *after} if before.get(k) != after.get(k))
            problems.append(f"input changed: {', '.join(changed[:3])}")
        left = leftovers(after, before) + leftovers(snapshot(scratch.out), {})
        left += [f"tmp/{p.name}" for p in (scratch.root / "tmp").iterdir() if not p.name.startswith("torch")]
        if outcome.code:
            left += [name for name in unfinished(scratch.out) if name not in left]
        if left and outcome.code >= 0:  # what was killed could not clear up
            problems.append(f"left over: {', '.join(left[:4])}")
        if (scratch.root / CANARY).exists():
            problems.append("code of the input ran")
            (scratch.root / CANARY).unlink()
        if outcome.code == 0 and not problems:
            problems += self._accepted(step, outcome)
        tail = "\n".join(line[:300] for line in outcome.err.strip().splitlines()[-6:])
        return outcome, [Finding(p, step.name, step.argv, tail, signature(outcome, p)) for p in problems]

    def _accepted(self, step: Step, outcome: Outcome) -> list[str]:
        """Whether success is a silent acceptance of the damage."""
        if step.expect == "refuse":
            return ["accepted"]
        if step.expect == "warned":
            lines = [line for line in outcome.err.lower().splitlines() if "warning" in line and USUAL not in line]
            return [] if lines else ["accepted without a warning"]
        if step.expect == "left out":
            return [] if json.loads(outcome.out)["unfinished"] else ["accepted a value that cannot be"]
        if step.expect == "any" or step.result is None:
            return []
        try:
            found = step.result(self.scratch, outcome)
        except Exception as error:  # torch has many for a file that is none
            return [f"accepted, and made nothing that can be read ({type(error).__name__})"]
        if found == self.right[step.name]:
            return []
        if step.settle is None:
            return ["accepted, with another result"]
        return (
            [] if child.run(step.settle, self.scratch.root / "log").code else ["accepted, and what it made is verified"]
        )


def printed(scratch: Scratch, outcome: Outcome) -> str:
    """What a command printed."""
    return outcome.out


def files(folder: Callable[[Scratch], Path]) -> Callable[[Scratch, Outcome], str]:
    """Every file of a folder, but for locks."""

    def result(scratch: Scratch, outcome: Outcome) -> str:
        found = snapshot(folder(scratch))
        return json.dumps({k: v for k, v in sorted(found.items()) if not k.endswith(".lock")})

    return result


def run_result(folder: Callable[[Scratch], Path]) -> Callable[[Scratch, Outcome], str]:
    """The weights and losses of a run."""

    def result(scratch: Scratch, outcome: Outcome) -> str:
        run = folder(scratch)
        weights = [contents.checkpoint(run / "weights" / f"{name}.pt") for name in ("last", "best")]
        return json.dumps([contents.losses(run / "results.csv"), weights, sorted(snapshot(run))])

    return result


def scores(scratch: Scratch, outcome: Outcome) -> str:
    """What ``eval --out`` found."""
    metrics: dict[str, Any] = json.loads((scratch.out / "scores" / "metrics.json").read_text())
    metrics = {k: v for k, v in metrics.items() if k not in ("images_per_s", "checkpoint", "path")}
    return json.dumps([metrics, (scratch.out / "scores" / "detections.json").read_text()])
