"""Which images of a data set are used."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kdcli.data.check import AS_USUAL, CheckReport, check_dataset
from kdcli.data.check_boxes import MANY
from kdcli.data.coco import Dataset
from kdcli.data.coco_boxes import borders, clip_xyxy, owners, thin
from kdcli.data.reading import Reading
from kdcli.data.views import MIN_SIDE as CANVAS_SIDE
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.errors import DataError, pluralize
from kdcli.store.provenance import DatasetRecord
from kdcli.store.reader import StoreReader
from kdcli.structures import Canvas

DECODED_IMAGES = 1000  # seconds; all of COCO would take minutes at each start


@dataclass(frozen=True)
class Usable:
    """A split as it is to be read, and which of its images are used."""

    dataset: Dataset
    positions: NDArray[np.int64]
    report: CheckReport

    @property
    def left_out(self) -> frozenset[int]:
        """Positions of the others."""
        return frozenset(range(self.dataset.num_images)) - frozenset(self.positions.tolist())


def usable(
    dataset: Dataset, skip_bad: bool, reporter: ProgressReporter, image_store: StoreReader | None = None, *,
    reading: Reading = AS_USUAL, trains: bool,
) -> Usable:  # fmt: skip
    """Which images may be used. Raises DataError on a fault unless ``skip_bad``, which lists them.

    Images are decoded whole when the set is small or when bad ones are to be left out; else their headers are read, and
    an image that cannot be decoded stops the run when its turn comes. With ``image_store``, a store that has the pixels, no
    file is opened: the bad ones are those that the store was written without. ``trains``: there must be boxes to train on;
    else the split is scored on, and one without annotations is warned of.
    """
    decode = skip_bad or dataset.num_images <= DECODED_IMAGES
    if image_store is not None:
        ignored = reading.exif == "ignore" or image_store.manifest.dataset.exif is not None
        dataset = replace(dataset, exif=not ignored)
    report = check_dataset(dataset, decode=decode, files=image_store is None, reading=reading, trains=trains)
    report.refuse(skip_bad)
    if trains:
        report.refuse_without_boxes()
    for warning in report.warnings:
        if warning.loud:
            reporter.message(f"warning: {dataset.split}: {warning}")
    for fault in report.faults:
        reporter.message(f"left out: {fault.where}: {fault.message}")
    bad = set(report.bad_images)
    if image_store is not None and skip_bad:
        gone = set(image_store.manifest.dataset.left_out)
        lost = {i for i in range(dataset.num_images) if dataset.image_id(i) in gone} - bad
        if lost:
            reporter.message(
                f"left out: {pluralize(len(lost), 'image')} that store '{image_store.storage}' was written without"
            )
        bad |= lost
    keep = np.array([i for i in range(dataset.num_images) if i not in bad], dtype=np.int64)
    assert report.dataset is not None
    return Usable(report.dataset, keep, report)


def as_stored(dataset: Dataset, record: DatasetRecord) -> Dataset:
    """``dataset``, read as the rows of a store were: orientations and boxes beyond the border."""
    return replace(dataset, exif=record.exif is None, clip=record.boxes is not None)


def require_boxes_on(
    dataset: Dataset, positions: NDArray[np.int64], canvas: Canvas, reporter: ProgressReporter
) -> None:  # fmt: skip
    """Raises DataError when the canvas leaves no box of the images at ``positions`` a pixel a side; warns when many go."""
    notes = dataset.annotations
    owner = owners(notes)
    mine = np.isin(owner, positions) & ~notes.crowd & (notes.category >= 0) & ~thin(notes)
    height, width = borders(notes)
    corners = clip_xyxy(notes.boxes_xywh, height, width)[mine]
    sides = np.minimum(corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1])
    h, w = height[mine], width[mine]
    scale = np.maximum(
        np.minimum(canvas.height / h, canvas.width / w), np.minimum(canvas.width / h, canvas.height / w)
    )  # of the better orientation
    lost = int((sides * scale < CANVAS_SIDE).sum())
    words = f"{lost} of {len(sides)} boxes have a side under 1 pixel on the canvas {canvas}"
    if len(sides) and lost == len(sides):
        raise DataError(f"{dataset.annotations_path}: {words}, so there is no box to train on; give a larger --canvas")
    if lost >= max(1, MANY * len(sides)):
        reporter.message(f"warning: {dataset.split}: {words}, and are not trained on")


def with_boxes(dataset: Dataset, positions: NDArray[np.int64], reporter: ProgressReporter) -> NDArray[np.int64]:
    """Those of ``positions`` whose image has a box to train on: no crowd, no side below a pixel of the image.

    Raises DataError when none is left.
    """
    keep = np.array([len(dataset.training_boxes(int(p))[0]) > 0 for p in positions], dtype=bool)
    if not keep.any():
        raise DataError(
            f"{dataset.annotations_path}: no image has a box to train on; correct it, or leave skip_empty out"
        )
    if not keep.all():
        reporter.message(f"left out: {int((~keep).sum())} of {len(keep)} images, which have no box to train on")
    kept: NDArray[np.int64] = positions[keep]
    return kept
