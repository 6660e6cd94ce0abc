"""Which group the others are measured against, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcli.errors import MissingPathError, OptionError, pluralize
from kdcli.report.runs import Run, load_run


def with_baseline(runs: Sequence[Run], baseline: Path | None) -> list[Run]:
    """``runs`` and the baseline's run, which may lie elsewhere."""
    known = list(runs)
    if baseline is None:
        return known
    run = next((run for run in known if run.path.resolve() == baseline.resolve()), None)
    if run is None:
        if not (baseline / "config.toml").is_file():
            raise MissingPathError(f"baseline '{baseline}' is no run folder: give one run, which holds config.toml")
        run = load_run(baseline)
        known.append(run)
    if run.problem is not None:
        raise OptionError(f"baseline '{baseline}' cannot be compared with: {run.problem}")
    return known


def baseline_index(members: Sequence[Sequence[Run]], baseline: Path | None, notes: list[str]) -> int | None:
    """Which group is the baseline; says why in ``notes``."""
    if baseline is not None:
        notes.append(f"the baseline is the group of '{baseline}', as asked for")
        chosen = baseline.resolve()
        return next(i for i, group in enumerate(members) if any(run.path.resolve() == chosen for run in group))
    distilled = [group[0] for group in members if group[0].command == "distill"]
    best: tuple[int, int] | None = None
    index = None
    for i, group in enumerate(members):
        run = group[0]
        if run.command == "distill":
            continue
        alike = [other for other in distilled if (other.model, other.epochs) == (run.model, run.epochs)]
        score = (len(alike), sum(_equal_settings(run, other) for other in alike))
        if alike and (best is None or score > best):
            best, index = score, i
    if best is None or index is None:
        notes.append(
            "no baseline: no finished plain training shares model and epochs with a distilled run; "
            "name one with --baseline"
        )
        return None
    run = members[index][0]
    notes.append(
        f"the baseline is plain training of {run.model} for {pluralize(run.epochs or 0, 'epoch')}: it shares model and "
        f"epochs with {best[0]} of {len(distilled)} distilled groups"
    )
    return index


def _equal_settings(run: Run, other: Run) -> int:
    mine, theirs = run.settings, other.settings
    return sum(mine[key] == theirs[key] for key in mine.keys() & theirs.keys())


def note_unlike_baseline(members: Sequence[Sequence[Run]], labels: Sequence[str], notes: list[str]) -> None:
    """Say where a difference to the baseline is not due to distillation alone."""
    base = members[0][0]
    for group, label in zip(members[1:], labels[1:], strict=True):
        run = group[0]
        if run.command != "distill":
            continue
        apart = [word for word, a, b in _shape(run, base) if a != b]
        if apart:
            notes.append(f"{label} differs from the baseline in {' and '.join(apart)} too, not in distillation alone")


def _shape(run: Run, base: Run) -> list[tuple[str, Any, Any]]:
    return [
        ("model", run.model, base.model),
        ("epochs", run.epochs, base.epochs),
        ("canvas", run.config.get("canvas"), base.config.get("canvas")),
    ]
