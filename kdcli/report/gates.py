"""What makes a command fail: a gate that finds things worse than asked for, or that has nothing to look at."""

from __future__ import annotations

import math

from kdcli.errors import GateError
from kdcli.report.compare import Comparison


def require_no_worse(comparison: Comparison) -> None:
    """``--fail-if-worse``. Raises GateError for a group below the baseline, and when not every run could be compared."""
    flag = "--fail-if-worse cannot be answered"
    if comparison.unfinished:
        left_out = "; ".join(f"'{run.path}' takes no part ({run.problem})" for run in comparison.unfinished)
        raise GateError(f"{flag}: {left_out}; finish it, or leave it out of the comparison")
    if comparison.baseline is None:
        raise GateError(f"{flag}: there is no baseline; name one with --baseline")
    compared = [(group.name, group.diff.mean) for group in comparison.groups if group.diff is not None]
    if not compared:
        raise GateError(f"{flag}: there is nothing but the baseline; name the runs to compare with it")
    worse = [name for name, mean in compared if not mean >= 0]
    if worse:
        raise GateError(f"below the baseline: {', '.join(worse)}")


def require_reachable(min_ap: float | None) -> None:
    """``--min-ap``, before the work. Raises GateError for no number, which no AP is below or above."""
    if min_ap is not None and math.isnan(min_ap):
        raise GateError("--min-ap nan: no AP can be compared with it; give one from 0 to 100")


def require_ap(ap: float | None, min_ap: float | None) -> None:
    """``--min-ap``. Raises GateError for an AP below it, and for one that is not defined."""
    if min_ap is None:
        return
    if ap is None:
        raise GateError(f"--min-ap {min_ap:g} cannot be answered: the split has no ground truth, so no AP")
    if not ap >= min_ap:
        raise GateError(f"AP {ap} is below --min-ap {min_ap:g}")
