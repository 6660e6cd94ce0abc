"""How a split is read where its files leave it open: which way round its pictures are, and boxes beyond the border.

An annotation file gives the size of every image. For a picture that its EXIF orientation turns by a quarter the size says
whether the boxes are of the turned picture. For a half turn or a mirror it cannot, so these follow the others of the set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from kdcli.data.coco import Dataset, has_split, open_split
from kdcli.data.exif import turned_size
from kdcli.data.images import probe_image
from kdcli.errors import DataError, MissingPathError
from kdcli.options import Exif

MAX_THREADS = 8
BLOCK = 1024  # images in flight; a task for each of 118,000 images would hold 150 MB

T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """What a user says of a data set."""

    exif: Exif = "auto"
    clip_boxes: bool = False
    like_ignored: bool = (
        False  # auto, and sizes say nothing: as in the split that this one goes with, which ignores them
    )


@dataclass(frozen=True)
class Orientations:
    """Which images of a split have an EXIF orientation: their positions."""

    turned: tuple[int, ...] = ()  # by a quarter, and the annotated size is that of the turned picture
    stored: tuple[int, ...] = ()  # by a quarter, and the annotated size is that in the file
    open: tuple[int, ...] = ()  # half turns, mirrors, and quarter turns of squares: no size shows

    @property
    def count(self) -> int:
        """All tagged images."""
        return len(self.turned) + len(self.stored) + len(self.open)

    @property
    def proven(self) -> bool | None:
        """Whether the annotations speak of turned pictures, as most that show it say; None when none shows it."""
        if not self.turned and not self.stored:
            return None
        return len(self.turned) >= len(self.stored)


def sort_orientations(dataset: Dataset, tags: dict[int, tuple[int, tuple[int, int]]]) -> Orientations:
    """``tags``: tag and stored (height, width) by the position of an image, of those that have one."""
    kinds: dict[str, list[int]] = {"turned": [], "stored": [], "open": []}
    for i, (tag, stored) in tags.items():
        turned = turned_size(tag, stored)
        kind = "open" if turned == stored else "turned" if turned == dataset.image_size(i) else "stored"
        kinds[kind].append(i)
    return Orientations(**{kind: tuple(positions) for kind, positions in kinds.items()})


def settle_exif(dataset: Dataset, found: Orientations, reading: Reading) -> tuple[Dataset, bool | None]:
    """``dataset`` with its rule for orientations, and what proves that rule, None when nothing does.

    A split that has something to decide and no proof goes by the other one of its set: train by val, any other by train.
    """
    proven = found.proven
    if proven is None and found.open and reading.exif == "auto":
        proven = False if reading.like_ignored else _of_sibling(dataset).proven
    ignore = proven is False if reading.exif == "auto" else reading.exif == "ignore"
    return replace(dataset, exif=not (ignore and found.open)), proven  # without such images nothing is read otherwise


def _of_sibling(dataset: Dataset) -> Orientations:
    other = "val" if dataset.split == "train" else "train"
    if not has_split(dataset.root, other):
        return Orientations()
    sibling = open_split(dataset.root, other)

    def tag(i: int) -> tuple[int, tuple[int, int]]:
        try:
            return probe_image(sibling.image_path(i), sibling.image_size(i))
        except (MissingPathError, DataError):
            return 1, (0, 0)  # that split's own faults are told when it is read

    found = {i: seen for i, seen in enumerate(over_images(sibling.num_images, tag)) if seen[0] != 1}
    return sort_orientations(sibling, found)


def over_images(count: int, look: Callable[[int], T]) -> Iterator[T]:
    """``look`` at the positions 0 to ``count`` - 1 in threads (Pillow decodes without the GIL), in their order."""
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        for start in range(0, count, BLOCK):
            yield from pool.map(look, range(start, min(start + BLOCK, count)))
