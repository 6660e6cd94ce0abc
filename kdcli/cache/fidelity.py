"""How far decoded tensors are from what the teacher gave, accumulated while a store is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 256  # squares are summed in float32 so many at a time, exact to 1e-8: in float64 a row of features takes 0.3 ms more


class ErrorMeter:
    """Sums over many rows; plain numbers go to the journal, so that the errors of a resumed store are exact too."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, float]] = {}

    def add(self, key: str, exact: NDArray[np.float32], decoded: NDArray[np.float32]) -> None:
        """Compare one row's tensor, both [..]; empty rows add nothing."""
        if exact.size == 0:
            return
        difference, reference = (decoded - exact).ravel(), exact.ravel()
        entry = self.sums.setdefault(key, {"squares": 0.0, "reference": 0.0, "count": 0.0, "worst": 0.0})
        entry["worst"] = max(entry["worst"], float(difference.max()), -float(difference.min()))
        entry["squares"] += _dot(difference, difference)
        entry["reference"] += max(0.0, _dot(reference, reference) - _sum(reference) ** 2 / reference.size)
        entry["count"] += exact.size

    def join(self, sums: Mapping[str, Mapping[str, float]]) -> None:
        """Add the sums of another meter."""
        for key, entry in sums.items():
            mine = self.sums.setdefault(key, {"squares": 0.0, "reference": 0.0, "count": 0.0, "worst": 0.0})
            for name in ("squares", "reference", "count"):
                mine[name] += entry[name]
            mine["worst"] = max(mine["worst"], entry["worst"])


def _dot(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    whole = len(a) // BLOCK * BLOCK
    blocks = np.einsum("ij,ij->i", a[:whole].reshape(-1, BLOCK), b[:whole].reshape(-1, BLOCK))
    return _sum(blocks) + float(np.einsum("i,i->", a[whole:], b[whole:], dtype=np.float64))


def _sum(a: NDArray[np.float32]) -> float:
    return float(a.sum(dtype=np.float64))


def summarise(parts: Iterable[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Join the sums of all shards: ``rms`` and ``worst`` in the tensor's unit, ``relative`` to its standard deviation."""
    meter = ErrorMeter()
    for part in parts:
        meter.join(part)
    return {
        key: {
            "rms": float(np.sqrt(t["squares"] / t["count"])),
            "relative": float(np.sqrt(t["squares"] / t["reference"])) if t["reference"] else 0.0,
            "worst": t["worst"],
        }
        for key, t in meter.sums.items()
    }
