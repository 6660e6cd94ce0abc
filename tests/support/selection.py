"""Which cases of a matrix ``make test`` runs; ``make test-all`` runs them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

FULL = pytest.mark.full


def matrix(cases: Iterable[Any], quick: Callable[[Any], bool] | None = None) -> list[Any]:
    """``cases`` for ``parametrize``, of which ``make test`` runs those that ``quick`` names; without it, the first alone.

    A tuple is a case of several parameters.
    """
    listed = list(cases)
    chosen = [case for case in listed if quick(case)] if quick else listed[:1]
    assert chosen, "a matrix needs a case in make test"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in chosen else FULL)
        for case in listed
    ]
