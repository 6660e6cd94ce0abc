"""Look for what is wrong with a split before hours are spent on it.

Faults stop training: missing or corrupt images, a size other than the annotated one, unknown categories, duplicate ids,
one file under several ids with other boxes, annotations of unlisted images, boxes wholly outside or more than 2 pixels
over the border (so large a gap means that boxes and image do not belong together), no box at all to train on. Warnings
are counted, and training goes on: boxes over the border by up to 2 pixels are clipped, boxes with a side under 1 pixel
are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kdcli.data.check_boxes import BEYOND, BoxFindings, check_boxes
from kdcli.data.check_files import (
    FileFindings,
    Progress,
    look_at_files,
    orientation_warnings,
    repeated_files,
    repeated_pictures,
)
from kdcli.data.coco import Dataset
from kdcli.data.coco_boxes import owners
from kdcli.data.findings import Fault, Warned, box_name, image_name, warned
from kdcli.data.reading import Reading, settle_exif
from kdcli.errors import DataError, pluralize

# of the whole split: leaving images out does not cure them
FATAL = ("no categories", "no images", "boxes in another form", "nothing to train on", "nothing to score")
AS_USUAL = Reading()


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What `check_dataset` found in a split."""

    where: str  # the annotation file
    dataset: Dataset | None  # the split, with the rules it is to be read by; None when it could not be opened
    faults: tuple[Fault, ...]
    warnings: tuple[Warned, ...]
    bad_images: frozenset[int]  # positions of the images to leave out under --skip-bad
    num_images: int
    num_empty: int  # images without a box to train on: allowed
    num_boxes: int
    num_crowd: int
    num_good: int = 0  # boxes to train on, on images without a fault
    digests: tuple[bytes, ...] | None = None  # sha256 of each image file that was read whole; b"" for a faulty one

    def refuse(self, skip_bad: bool) -> None:
        """Raise DataError when training on this split must stop.

        With ``skip_bad`` only for what leaving images out cannot cure: no category, no image left, nothing to train on.
        """
        if not self.faults:
            return
        fatal = [f for f in self.faults if f.kind in FATAL]
        first = (fatal or self.faults)[0]
        if fatal:
            raise DataError(f"{self.where}: {first.message}")
        if not skip_bad:
            beyond = "clip such boxes with --clip-boxes, " if first.kind in BEYOND else ""
            raise DataError(
                f"{self.where} has {pluralize(len(self.faults), 'fault')}, first {first.kind}: {first.message}; "
                f"list them with kdcli data check, {beyond}or leave the images out with --skip-bad"
            )
        if len(self.bad_images) == self.num_images:
            raise DataError(f"{self.where}: every image has a fault, first {first.kind}: {first.message}")

    def refuse_without_boxes(self) -> None:
        """Raise DataError when no box to train on is left once the images with faults are left out."""
        if not self.num_good:
            first = self.faults[0]
            raise DataError(
                f"{self.where}: every image with a box to train on has a fault, first {first.kind}: {first.message}"
            )


def check_dataset(
    dataset: Dataset, decode: bool = True, progress: Progress | None = None, *, files: bool = True,
    reading: Reading = AS_USUAL, trains: bool = True,
) -> CheckReport:  # fmt: skip
    """Check images and annotations of a split; finds everything, raises nothing for it.

    ``decode``: read every image whole; otherwise only that it exists and has the annotated size (its header), which is
    what training does before it starts. ``files``: False when the pixels come from elsewhere; no image file is opened.
    ``reading``: what the user says of orientations and boxes beyond the border. ``trains``: False for a split to score on,
    which may be without annotations: its AP is then not defined.
    """
    notes = dataset.annotations
    boxes = check_boxes(dataset, reading.clip_boxes)
    dataset = replace(dataset, clip=boxes.clip)
    found, about_files = FileFindings(), list[Warned]()
    if files:
        asked = replace(dataset, exif=reading.exif != "ignore")
        found = look_at_files(asked, decode, progress)
        dataset, proven = settle_exif(asked, found.orientations, reading)
        about_files = orientation_warnings(dataset, found.orientations, proven, reading.exif)
    twice, same = repeated_files(dataset)
    if found.digests is not None:
        same += repeated_pictures(dataset, found.digests)
    faults = [*_table_faults(dataset), *twice, *found.faults, *boxes.faults]
    totals, unlabelled = _totals(dataset, boxes, trains)
    bad = frozenset(f.image for f in faults if f.image is not None)
    sums = np.concatenate([[0], np.cumsum(boxes.trained.astype(np.int64))])
    each = np.diff(sums[notes.box_offsets])
    return CheckReport(
        where=str(dataset.annotations_path),
        dataset=dataset,
        faults=(*faults, *totals),
        warnings=(*unlabelled, *_name_warnings(dataset), *same, *about_files, *boxes.warnings),
        bad_images=bad,
        num_images=dataset.num_images,
        num_empty=int((each == 0).sum()),
        num_boxes=len(notes.category),
        num_crowd=int(notes.crowd.sum()),
        num_good=int(each.sum()) - int(each[sorted(bad)].sum()),
        digests=found.digests,
    )


def _totals(dataset: Dataset, boxes: BoxFindings, trains: bool) -> tuple[list[Fault], list[Warned]]:
    """What is to be said when nothing is left to train or to score on, though each part is allowed."""
    if boxes.nothing is None:
        return [], []
    where = str(dataset.annotations_path)
    if trains:
        return [Fault("nothing to train on", where, f"no box to train on: {boxes.nothing}")], []
    if boxes.unlabelled:
        return [], warned("split without a box to score on, so that its AP is not defined", [boxes.nothing], loud=True)
    return [Fault("nothing to score", where, f"no box to score on: {boxes.nothing}")], []


def _name_warnings(dataset: Dataset) -> list[Warned]:
    """Categories that were dropped for their name, and those that are hard to tell apart."""
    dropped = [f"{c.name!r} (id {c.id})" for c in dataset.annotations.dropped]
    alike = [" and ".join(f"{c.name!r} (id {c.id})" for c in group) for group in dataset.classes.look_alikes()]
    return [
        *warned("category without boxes that has the name of another, dropped", dropped, loud=True),
        *warned("group of categories whose names differ by case, blanks or Unicode form alone", alike, loud=True),
    ]


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
        yield Fault("duplicate image id", image_name(dataset, i), message, i)
    owner = owners(notes)
    for row in np.flatnonzero(_repeated(notes.annotation_ids)).tolist():
        message = f"annotation id {notes.annotation_ids[row]} is used twice; number annotations anew"
        yield Fault("duplicate annotation id", box_name(dataset, row, int(owner[row])), message, int(owner[row]))
    for row in np.flatnonzero(notes.category < 0).tolist():
        message = f"annotation {notes.annotation_ids[row]} has a category_id that 'categories' does not list"
        yield Fault("unknown category", box_name(dataset, row, int(owner[row])), message, int(owner[row]))
    for annotation_id, image_id in notes.orphans.tolist():
        message = f"annotation {annotation_id} is on image id {image_id}, which 'images' does not list"
        yield Fault("unknown image", f"annotation {annotation_id}", message)


def _repeated(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which entries share their id with another one: all of them, since nothing says which is meant."""
    values, counts = np.unique(ids, return_counts=True)
    return np.isin(ids, values[counts > 1])
