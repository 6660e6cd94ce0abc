"""Which images of a data set are used."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcli.data.check import check_dataset
from kdcli.data.coco import Dataset
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.errors import DataError, pluralize
from kdcli.store.reader import StoreReader

DECODED_IMAGES = 1000  # seconds; all of COCO would take minutes at each start


def usable(
    dataset: Dataset, skip_bad: bool, reporter: ProgressReporter, pictured: StoreReader | None = None
) -> NDArray[np.int64]:
    """Positions of the images that may be used. Raises DataError on a fault unless ``skip_bad``, which lists them.

    Images are decoded whole when the set is small or when bad ones are to be left out; else their headers are read, and
    an image that cannot be decoded stops the run when its turn comes. With ``pictured``, a store that has the pixels, no
    file is opened: the bad ones are those that the store was written without.
    """
    decode = skip_bad or dataset.num_images <= DECODED_IMAGES
    report = check_dataset(dataset, decode=decode, files=pictured is None)
    report.refuse(skip_bad)
    for fault in report.faults:
        reporter.message(f"left out: {fault.where}: {fault.message}")
    bad = set(report.bad_images)
    if pictured is not None and skip_bad:
        gone = set(pictured.manifest.dataset.left_out)
        lost = {i for i in range(dataset.num_images) if dataset.image_id(i) in gone} - bad
        if lost:
            reporter.message(
                f"left out: {pluralize(len(lost), 'image')} that store '{pictured.storage}' was written without"
            )
        bad |= lost
    keep = np.array([i for i in range(dataset.num_images) if i not in bad], dtype=np.int64)
    return keep


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
