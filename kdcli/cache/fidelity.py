"""How far decoded tensors are from what the teacher gave, accumulated while a store is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 256  # squared errors added in float32 at a time: exact to 1e-7, and float64 takes five times as long


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
        entry["squares"] += _squares(difference)
        # in float64 throughout: what is left of two large numbers where the mean is far from 0
        entry["reference"] += max(0.0, _dot(reference) - _sum(reference) ** 2 / reference.size)
        entry["count"] += exact.size

    def join(self, sums: Mapping[str, Mapping[str, float]]) -> None:
        """Add the sums of another meter."""
        for key, entry in sums.items():
            mine = self.sums.setdefault(key, {"squares": 0.0, "reference": 0.0, "count": 0.0, "worst": 0.0})
            for name in ("squares", "reference", "count"):
                mine[name] += entry[name]
            mine["worst"] = max(mine["worst"], entry["worst"])


def _squares(values: NDArray[np.float32]) -> float:
    whole = len(values) // BLOCK * BLOCK
    blocks = values[:whole].reshape(-1, BLOCK)
    return _sum(np.einsum("ij,ij->i", blocks, blocks)) + _dot(values[whole:])


def _dot(values: NDArray[np.float32]) -> float:
    return float(np.einsum("i,i->", values, values, dtype=np.float64))


def _sum(values: NDArray[np.float32]) -> float:
    return float(values.sum(dtype=np.float64))


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
