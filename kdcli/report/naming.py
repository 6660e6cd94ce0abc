"""Short names for groups of runs: the methods, or ``baseline``, and what sets a group apart from its namesakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

from kdcli.report.runs import Run
from kdcli.report.text import plain, spelled

_MOST_KEYS = 3  # a name is a label of a bar: further differences are in the table of settings
_PATHS = frozenset({"cache", "teacher", "init_from"})
_IN_NAME_ALREADY = frozenset({"command", "method"})


def name_groups(firsts: Sequence[Run], roles: Sequence[str]) -> list[str]:
    """One distinct name for each group, given one run and the role of each.

    A group is named after its methods, or without methods after its role (baseline, teacher, train); groups that would
    share a name also by the settings that set them apart, plain training by those that set it apart from the baseline.
    """
    bases = ["+".join(method_names(run)) or role for run, role in zip(firsts, roles, strict=True)]
    names = []
    for run, base in zip(firsts, bases, strict=True):
        rival = "baseline" if base == "train" and "baseline" in bases else base
        rivals = [other for other, name in zip(firsts, bases, strict=True) if name == rival]
        apart = _what_differs(run, rivals) if base != "baseline" else []
        names.append(f"{base} ({', '.join(apart)})" if apart else base)
    counts = Counter(names)
    seen: Counter[str] = Counter()
    for i, name in enumerate(names):
        if counts[name] > 1:
            seen[name] += 1
            names[i] = f"{name} #{seen[name]}"
    return names


def method_names(run: Run) -> tuple[str, ...]:
    """The methods of a run; one from a user's file (``./mine.py:Mine``) by its class."""
    return tuple(plain(method.rpartition(":")[2]) for method in run.methods)


def _what_differs(run: Run, rivals: Sequence[Run]) -> list[str]:
    """``key=value`` of the settings in which ``run`` and the others of the same base name are not all equal."""
    mine = run.settings
    keys = [
        key
        for key in mine
        if key not in _IN_NAME_ALREADY and any(other.settings.get(key) != mine[key] for other in rivals)
    ]
    shown = [f"{_key(key)}={_short(key, mine[key])}" for key in keys[:_MOST_KEYS]]
    return [*shown, "..."] if len(keys) > _MOST_KEYS else shown


def _key(key: str) -> str:
    """``model.name`` as the flag it came from, ``methods.ld.temperature`` as ``--set`` spells it."""
    return "model" if key == "model.name" else plain(key.removeprefix("methods."))


def _short(key: str, value: object) -> str:
    text = PurePath(str(value)).name if key in _PATHS else spelled(value)
    return text if len(text) <= 24 else text[:23] + "…"
