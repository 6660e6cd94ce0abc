"""Every error a user can cause, with its exit code.

KDError                      1
├── UsageError    ValueError         2  a flag that is missing
├── OptionError   ValueError         3  unknown key, bad value, a method a model cannot do
├── DataError     ValueError         3  images or annotations that are wrong
├── MissingPathError FileNotFoundError 3  a path that is not there
├── StoreError    ValueError         4  a store that is foreign, incomplete or corrupt
├── NoSpaceError  OSError            5  the disk cannot hold what was asked for
├── GateError     RuntimeError       6  a guard or quality gate stopped the run
└── WorkerError   RuntimeError       7  a helper process ended before its work was done

Each is also the nearest builtin, so both kinds of ``except`` work. Messages are one line: what is wrong, where, the fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KDError(Exception):
    """Base of all errors that a user can cause."""

    exit_code = 1


class UsageError(KDError, ValueError):
    """A flag that the command cannot do without is missing."""

    exit_code = 2


class OptionError(KDError, ValueError):
    """An option has an unknown name or an impossible value."""

    exit_code = 3


class DataError(KDError, ValueError):
    """The data set is wrong."""

    exit_code = 3


class MissingPathError(KDError, FileNotFoundError):
    """A path does not exist."""

    exit_code = 3


class StoreError(KDError, ValueError):
    """A store is foreign, incomplete or corrupt."""

    exit_code = 4


class NoSpaceError(KDError, OSError):
    """The disk cannot hold what was asked for."""

    exit_code = 5


class GateError(KDError, RuntimeError):
    """A guard or a quality gate stopped the run."""

    exit_code = 6


class WorkerError(KDError, RuntimeError):
    """A helper process, e.g. a data worker, was killed or could not go on."""

    exit_code = 7


def pluralize(count: int, noun: str) -> str:
    """``1 fault``, ``2 faults``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``known``, or what there is to choose from."""
    choices = sorted(known)
    match = difflib.get_close_matches(word[:100], choices, n=1, cutoff=0.5)  # it takes 3 s of a word of 3 MB
    if match:
        return f"; did you mean '{match[0]}'?"
    return f"; choose from {', '.join(choices)}" if choices else ""
