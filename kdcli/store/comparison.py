"""How two JSON tables differ, in words: what a refused store is told apart by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LONGEST = 200  # characters of a value


def compare(stored: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every field that differs or that one side lacks, as ``field: store X, here Y``; fields of tables by dotted names."""
    differences = []
    for name in {**here, **stored}:
        theirs, ours = stored.get(name), here.get(name)
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            differences += compare(theirs, ours, f"{prefix}{name}.")
        elif theirs != ours:
            differences.append(f"{prefix}{name}: store {_short(theirs)}, here {_short(ours)}")
    return differences


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
