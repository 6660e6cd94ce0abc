"""What a check of a data set finds, in words: faults, which training refuses, and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kdcli.data.coco import Dataset

NUM_EXAMPLES = 5  # of each kind of warning


@dataclass(frozen=True)
class Fault:
    """Something that training refuses."""

    kind: str  # e.g. "missing image"
    where: str  # the image or annotation
    message: str  # one line
    image: int | None = None  # position of the image to leave out; None when no single image is to blame


@dataclass(frozen=True)
class Warned:
    """Something that training puts up with, or puts right by itself."""

    kind: str
    count: int
    examples: tuple[str, ...]  # the first few
    loud: bool = False  # said at the start of a run too, not by `kdcli data check` alone

    def __str__(self) -> str:
        shown = f", e.g. {'; '.join(self.examples[:2])}" if self.examples else ""
        return f"{self.count} x {self.kind}{shown}"


def warned(kind: str, examples: Sequence[str], loud: bool = False, count: int | None = None) -> list[Warned]:
    """A warning of as many cases as ``examples`` names (or ``count``); none when there is none."""
    number = len(examples) if count is None else count
    return [Warned(kind, number, tuple(examples[:NUM_EXAMPLES]), loud)] if number else []


def image_name(dataset: Dataset, i: int) -> str:
    """``image 5 (a.png)``."""
    return f"image {dataset.image_id(i)} ({dataset.file_name(i)})"


def box_name(dataset: Dataset, row: int, image: int) -> str:
    """``annotation 9 of image 5 (a.png)``; ``image``: position of the image that the box at ``row`` is on."""
    return f"annotation {dataset.annotations.annotation_ids[row]} of {image_name(dataset, image)}"
