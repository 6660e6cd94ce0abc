"""The teacher's row: the run that a teacher checkpoint came from if it is among the runs, else what was noted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcli.report.runs import Run


@dataclass(frozen=True)
class TeacherRow:
    """A teacher: its AP (0-100), its parameters if known, where both come from, and the groups that learnt from it."""

    name: str
    ap: float
    parameters: int | None
    source: str
    groups: tuple[str, ...]


def find_teachers(runs: Sequence[Run], group_of: Mapping[Path, str]) -> tuple[TeacherRow, ...]:
    """One row for each teacher of the distilled ``runs``; ``group_of`` maps a run's path to the name of its group."""
    users: dict[tuple[str, float, int | None, str], dict[str, None]] = {}
    origins = teacher_runs(runs)
    for run in runs:
        if run.command != "distill":
            continue
        if run.path in origins:
            origin, weights = origins[run.path]
            best = origin.value("best_ap") if weights == "best" else None
            count = origin.value("parameters")
            source = f"{origin.path} ({weights}.pt)"
            row = (origin.model, best or float(origin.metrics["ap"]), None if count is None else int(count), source)
        elif (ap := run.value("teacher_ap")) is not None:
            row = ("teacher", ap, None, _reference(run) or "the metrics of the distilled run")
        else:
            continue
        users.setdefault(row, {})[group_of[run.path]] = None
    return tuple(TeacherRow(*row, groups=tuple(names)) for row, names in users.items())


def teacher_runs(runs: Sequence[Run]) -> dict[Path, tuple[Run, str]]:
    """Path of a distilled run -> the run among ``runs`` that taught it and which of its weights, ``last`` or ``best``.

    A teacher is known by the sha256 of its weights (``teacher_sha256`` in the student's ``env.json``,
    ``weights_sha256`` in the teacher's ``metrics.json``), or else by its path.
    """
    hashes = {
        sha: (run, weights)
        for run in runs
        for weights, sha in sorted(run.metrics.get("weights_sha256", {}).items())  # "last" wins over an equal "best"
    }
    homes = {run.path.resolve(): run for run in runs}
    found: dict[Path, tuple[Run, str]] = {}
    for run in runs:
        if run.command != "distill":
            continue
        sha, named = run.env.get("teacher_sha256"), _by_path(run, homes)
        if named is not None and sha is not None and named[0].metrics.get("weights_sha256", {}).get(named[1]) == sha:
            origin: tuple[Run, str] | None = named  # best and last may be the same weights: then the path decides
        else:
            origin = hashes.get(sha) or named
        if origin is not None and origin[0] is not run:
            found[run.path] = origin
    return found


def _by_path(run: Run, homes: Mapping[Path, Run]) -> tuple[Run, str] | None:
    """The run whose folder (its last weights count then), or a file among whose weights, is the teacher of ``run``.

    A relative path was meant from the folder where the command ran, taken to be the present one or one above the run.
    """
    reference = _reference(run)
    if reference is None:
        return None
    for start in (Path.cwd(), *run.path.resolve().parents):
        place = (start / reference).resolve()
        if place in homes:
            return homes[place], "last"
        if place.parent.name == "weights" and place.parent.parent in homes:
            return homes[place.parent.parent], place.stem
    return None


def _reference(run: Run) -> str | None:
    """The path of the teacher as the run wrote it down, in its options or in ``env.json``."""
    teacher = run.config.get("teacher") or run.env.get("teacher")
    return str(teacher) if teacher else None
