"""How far decoded tensors are from what the teacher gave, accumulated while a store is written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcli.store.validation import check_keys, check_numbers

Numbers = Mapping[str, Mapping[str, float]]  # of each tensor, by their names
PART = 32768  # numbers at a time: a map of 1,706 x 128 takes 0.3 ms so and 0.4 at once, which leaves the nearest caches


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of each tensor: sums in the journal, ``summarise``d errors in the manifest."""

    encoding: Numbers = field(default_factory=dict)  # decoded, against what the teacher gave
    precision: Numbers = field(default_factory=dict)  # a teacher of another precision, against float32

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {"encoding": self.encoding, "precision": self.precision}

    @staticmethod
    def from_json(data: Any) -> Measured:
        """Inverse of ``to_json``. Raises ValueError for what is not finite or below 0, and for a count of 0."""
        check_keys(data, "errors", ("encoding", "precision"))
        return Measured(encoding=check_numbers(data["encoding"]), precision=check_numbers(data["precision"]))

    def of(self, tensors: Collection[str]) -> Measured:
        """Of these tensors alone."""
        encoding, precision = (
            {key: numbers for key, numbers in found.items() if key in tensors}
            for found in (self.encoding, self.precision)
        )
        return Measured(encoding=encoding, precision=precision)

    def __or__(self, other: Measured) -> Measured:
        """With the tensors of ``other``, which has those of both."""
        return Measured(encoding={**self.encoding, **other.encoding}, precision={**self.precision, **other.precision})


class ErrorMeter:
    """Sums over many rows; plain numbers go to the journal, so that the errors of a resumed store are exact too."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, float]] = {}

    def add(
        self,
        key: str,
        exact: NDArray[np.float32],
        decoded: NDArray[np.float32],
        keep: NDArray[np.bool_] | None = None,
    ) -> None:
        """Compare one row's tensor, both [n, ..]; of ``keep`` [n] only those rows. Empty ones add nothing."""
        if exact.size == 0 or (keep is not None and not keep.any()):
            return
        width = exact.size // len(exact)
        exact, decoded = exact.reshape(-1, width), decoded.reshape(-1, width)
        rows = max(1, PART // width)
        about = exact[:rows].mean()  # near enough to their mean that nothing is left of two large numbers
        total = around = 0.0
        entry = self.sums.setdefault(key, {"squares": 0.0, "reference": 0.0, "count": 0.0, "worst": 0.0})
        for start in range(0, len(exact), rows):
            part = slice(start, start + rows)
            reference = exact[part] - about
            difference = decoded[part] - exact[part]
            if keep is not None:  # 0 adds nothing, and takes a tenth of the time of a copy without these rows
                difference[~keep[part]] = reference[~keep[part]] = 0
            entry["worst"] = max(entry["worst"], float(difference.max()), -float(difference.min()))
            entry["squares"] += _squares(difference.ravel())
            around += _squares(reference.ravel())
            total += float(reference.sum())
        count = exact.size if keep is None else int(keep.sum()) * width
        entry["reference"] += max(0.0, around - total**2 / count)
        entry["count"] += count

    def join(self, sums: Numbers) -> None:
        """Add the sums of another meter."""
        for key, entry in sums.items():
            mine = self.sums.setdefault(key, {"squares": 0.0, "reference": 0.0, "count": 0.0, "worst": 0.0})
            for name in ("squares", "reference", "count"):
                mine[name] += entry[name]
            mine["worst"] = max(mine["worst"], entry["worst"])


def errors_of(parts: Iterable[Measured]) -> Measured:
    """The errors over all shards of what was ``Measured`` in each."""
    sums = list(parts)
    return Measured(
        encoding=summarise(part.encoding for part in sums), precision=summarise(part.precision for part in sums)
    )


def _squares(values: NDArray[np.float32]) -> float:
    return float(np.dot(values, values))  # 2e-7 off in float32; 7e-6 on an EPYC when they are all of a coarse grid


def summarise(parts: Iterable[Numbers]) -> dict[str, dict[str, float]]:
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
