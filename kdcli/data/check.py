"""Look for what is wrong with a split before hours are spent on it.

Faults stop training: missing or corrupt images, a size other than the annotated one, unknown categories, duplicate ids,
annotations of unlisted images, boxes wholly outside or more than 2 pixels over the border (so large a gap means that
boxes and image do not belong together). Warnings are counted, and training goes on: boxes over the border by up to
2 pixels are clipped, boxes with a side under 1 pixel are dropped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcli.data.coco import MIN_SIDE, Dataset, clip_xyxy, open_split
from kdcli.data.images import ImageSizeError, decode_image, probe_image
from kdcli.errors import DataError, KDError, MissingPathError, pluralize

MAX_OVER = 2.0  # pixels over the border that still count as rounding
NUM_EXAMPLES = 5  # of each kind of warning
MAX_THREADS = 8
BLOCK = 1024  # images in flight; a task for each of 118,000 images would hold 150 MB


@dataclass(frozen=True)
class Fault:
    """Something that training refuses."""

    kind: str  # e.g. "missing image"
    where: str  # the image or annotation
    message: str  # one line
    image: int | None = None  # position of the image to leave out; None when no single image is to blame


@dataclass(frozen=True)
class Warned:
    """Something that training puts right by itself."""

    kind: str
    count: int
    examples: tuple[str, ...]  # the first few


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What `check_dataset` found in a split."""

    where: str  # the annotation file
    faults: tuple[Fault, ...]
    warnings: tuple[Warned, ...]
    bad_images: frozenset[int]  # positions of the images to leave out under --skip-bad
    num_images: int
    num_empty: int  # images without a box to train on: allowed
    num_boxes: int
    num_crowd: int

    def refuse(self, skip_bad: bool) -> None:
        """Raise DataError when training on this split must stop.

        With ``skip_bad`` only for what leaving images out cannot cure: no category, or no image left.
        """
        if not self.faults:
            return
        fatal = [f for f in self.faults if f.kind in ("no categories", "no images")]
        first = (fatal or self.faults)[0]
        if fatal:
            raise DataError(f"{self.where}: {first.message}")
        if not skip_bad:
            raise DataError(
                f"{self.where} has {pluralize(len(self.faults), 'fault')}, first {first.kind}: {first.message}; "
                "list them with kdcli data check, or leave the images out with --skip-bad"
            )
        if len(self.bad_images) == self.num_images:
            raise DataError(f"{self.where}: every image has a fault, first {first.kind}: {first.message}")


Progress = Callable[[int, int], None]  # images done, images in all


def check_dataset(
    dataset: Dataset, decode: bool = True, progress: Progress | None = None, *, files: bool = True
) -> CheckReport:
    """Check images and annotations of a split; finds everything, raises nothing.

    ``decode``: read every image whole; otherwise only that it exists and has the annotated size (its header), which is
    what training does before it starts. ``files``: False when the pixels come from elsewhere; no image file is opened.
    """
    notes = dataset.annotations
    faults = [*_table_faults(dataset), *(_image_faults(dataset, decode, progress) if files else ())]
    box_faults, warnings = _check_boxes(dataset)
    faults += box_faults
    trained = (~notes.crowd & (notes.category >= 0) & ~_thin(dataset)).astype(np.int64)
    sums = np.concatenate([[0], np.cumsum(trained)])
    return CheckReport(
        where=str(dataset.annotations_path),
        faults=tuple(faults),
        warnings=tuple(warnings),
        bad_images=frozenset(f.image for f in faults if f.image is not None),
        num_images=dataset.num_images,
        num_empty=int((np.diff(sums[notes.box_offsets]) == 0).sum()),
        num_boxes=len(notes.category),
        num_crowd=int(notes.crowd.sum()),
    )


def open_splits(root: Path) -> tuple[dict[str, Dataset], dict[str, KDError]]:
    """train and val, which training needs both, and what stood against opening them. Raises it if neither opens."""
    opened: dict[str, Dataset] = {}
    refused: dict[str, KDError] = {}
    for split in ("train", "val"):
        try:
            opened[split] = open_split(root, split)
        except (DataError, MissingPathError) as error:
            refused[split] = error
    if not opened:
        raise next(iter(refused.values()))
    return opened, refused


def missing_report(root: Path, split: str, error: KDError) -> CheckReport:
    """The report on a split that could not be opened."""
    kind = "missing split" if isinstance(error, MissingPathError) else "unreadable split"
    fault = Fault(kind, str(root), f"{error}; training needs a train and a val split")
    return CheckReport(
        where=str(root), faults=(fault,), warnings=(), bad_images=frozenset(), num_images=0, num_empty=0, num_boxes=0,
        num_crowd=0,
    )  # fmt: skip


def category_fault(train: Dataset, val: Dataset) -> Fault | None:
    """What training refuses in two splits together: class names that are not the same in the same order."""
    ours, theirs = (split.classes.names for split in (train, val))
    if ours == theirs:
        return None
    odd = sorted(set(ours) ^ set(theirs))
    how = f"{', '.join(odd[:3])} in one alone" if odd else "the same names in another order of ids"
    message = f"train and val do not have the same categories ({how}); give both the same list"
    return Fault("different categories", str(val.annotations_path), message)


def _table_faults(dataset: Dataset) -> Iterator[Fault]:
    """Faults of ids and lists."""
    notes = dataset.annotations
    where = str(dataset.annotations_path)
    if not dataset.classes:
        yield Fault("no categories", where, "the list 'categories' is empty; a detector needs at least one class")
    if not dataset.num_images:
        yield Fault("no images", where, "the list 'images' is empty")
    for i in np.flatnonzero(_repeated(notes.image_ids)).tolist():
        message = f"image id {dataset.image_id(i)} is used twice (here by {dataset.file_name(i)!r}); number images anew"
        yield Fault("duplicate image id", _image(dataset, i), message, i)
    owner = _owner(dataset)
    for row in np.flatnonzero(_repeated(notes.annotation_ids)).tolist():
        message = f"annotation id {notes.annotation_ids[row]} is used twice; number annotations anew"
        yield Fault("duplicate annotation id", _box(dataset, row, owner), message, int(owner[row]))
    for row in np.flatnonzero(notes.category < 0).tolist():
        message = f"annotation {notes.annotation_ids[row]} has a category_id that 'categories' does not list"
        yield Fault("unknown category", _box(dataset, row, owner), message, int(owner[row]))
    for annotation_id, image_id in notes.orphans.tolist():
        message = f"annotation {annotation_id} is on image id {image_id}, which 'images' does not list"
        yield Fault("unknown image", f"annotation {annotation_id}", message)


def _image_faults(dataset: Dataset, decode: bool, progress: Progress | None) -> Iterator[Fault]:
    """Faults of the files, in the order of the images."""

    def look(i: int) -> Fault | None:
        kind = "bad file name"
        try:
            path = dataset.image_path(i)
            kind = "corrupt image"
            if decode:
                decode_image(path, dataset.image_size(i))
            else:
                probe_image(path, dataset.image_size(i))
        except MissingPathError as error:
            return Fault("missing image", _image(dataset, i), str(error), i)
        except ImageSizeError as error:
            return Fault("wrong image size", _image(dataset, i), str(error), i)
        except DataError as error:
            return Fault(kind, _image(dataset, i), str(error), i)
        return None

    total = dataset.num_images
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:  # Pillow decodes without the GIL
        for start in range(0, total, BLOCK):
            for i, fault in enumerate(pool.map(look, range(start, min(start + BLOCK, total))), start):
                if fault is not None:
                    yield fault
                if progress is not None:
                    progress(i + 1, total)


def _check_boxes(dataset: Dataset) -> tuple[list[Fault], list[Warned]]:
    """Faults and warnings of the boxes against their images' borders."""
    notes = dataset.annotations
    owner = _owner(dataset)
    height, width = notes.heights[owner], notes.widths[owner]
    x, y, w, h = notes.boxes_xywh.T
    # [0, 0, 0, 0] is not outside but thin: exporters write it for an object without a box
    outside = (x >= width) | (y >= height) | ((x + w <= 0) & (x < 0)) | ((y + h <= 0) & (y < 0))
    over = np.maximum.reduce([-x, -y, x + w - width, y + h - height]) if len(x) else np.zeros(0)
    far = (over > MAX_OVER) & ~outside
    thin = _thin(dataset) & ~outside & ~far
    faults = []
    for mask, kind in ((outside, "box outside"), (far, "box over the border")):
        for row in np.flatnonzero(mask).tolist():
            size = f"{height[row]}x{width[row]}"
            by = "wholly outside" if kind == "box outside" else f"{over[row]:.1f} px over the border of"
            box = notes.boxes_xywh[row].tolist()
            message = (
                f"annotation {notes.annotation_ids[row]}: box {box} lies {by} the image of {size} (height x width)"
            )
            faults.append(Fault(kind, _box(dataset, row, owner), message, int(owner[row])))
    clipped = (over > 0) & ~outside & ~thin & ~far
    found = (
        ("box over the border by up to 2 px, clipped", clipped),
        ("box with a side under 1 px, dropped", thin & ~notes.crowd),
    )
    warnings = []
    for kind, mask in found:
        rows = np.flatnonzero(mask).tolist()
        if rows:
            examples = tuple(_box(dataset, row, owner) for row in rows[:NUM_EXAMPLES])
            warnings.append(Warned(kind, len(rows), examples))
    return faults, warnings


def _thin(dataset: Dataset) -> NDArray[np.bool_]:
    """Boxes [M] that `Dataset.training_boxes` drops: a side under 1 pixel once clipped."""
    notes, owner = dataset.annotations, _owner(dataset)
    xyxy = clip_xyxy(notes.boxes_xywh, notes.heights[owner], notes.widths[owner])
    return np.minimum(xyxy[:, 2] - xyxy[:, 0], xyxy[:, 3] - xyxy[:, 1]) < MIN_SIDE


def _owner(dataset: Dataset) -> NDArray[np.int64]:
    """The image [M] of every box."""
    return np.repeat(np.arange(dataset.num_images), np.diff(dataset.annotations.box_offsets))


def _repeated(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which entries share their id with another one: all of them, since nothing says which is meant."""
    values, counts = np.unique(ids, return_counts=True)
    return np.isin(ids, values[counts > 1])


def _image(dataset: Dataset, i: int) -> str:
    return f"image {dataset.image_id(i)} ({dataset.file_name(i)})"


def _box(dataset: Dataset, row: int, owner: NDArray[np.int64]) -> str:
    return f"annotation {dataset.annotations.annotation_ids[row]} of {_image(dataset, int(owner[row]))}"
