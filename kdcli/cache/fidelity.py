"""How far decoded tensors are from what the teacher gave, accumulated while a store is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


class ErrorMeter:
    """Sums over many rows; plain numbers go to the journal, so that the errors of a resumed store are exact too."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, float]] = {}

    def add(self, key: str, exact: NDArray[np.float32], decoded: NDArray[np.float32]) -> None:
        """Compare one row's tensor, both [..]; empty rows add nothing."""
        if exact.size == 0:
            return
        difference = decoded.astype(np.float64) - exact
        entry = self.sums.setdefault(key, {"squares": 0.0, "reference": 0.0, "count": 0.0, "worst": 0.0})
        centred = exact.astype(np.float64) - exact.mean(dtype=np.float64)
        entry["squares"] += float(np.square(difference).sum())
        entry["reference"] += float(np.square(centred).sum())
        entry["count"] += exact.size
        entry["worst"] = max(entry["worst"], float(np.abs(difference).max()))

    def join(self, sums: Mapping[str, Mapping[str, float]]) -> None:
        """Add the sums of another meter."""
        for key, entry in sums.items():
            mine = self.sums.setdefault(key, {"squares": 0.0, "reference": 0.0, "count": 0.0, "worst": 0.0})
            for name in ("squares", "reference", "count"):
                mine[name] += entry[name]
            mine["worst"] = max(mine["worst"], entry["worst"])


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
