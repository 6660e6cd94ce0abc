"""What is wrong with train and val together: another list of categories, pictures that are in both, classes in one alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kdcli.data.check import CheckReport
from kdcli.data.check_files import plain_name
from kdcli.data.coco import Dataset, open_split
from kdcli.data.findings import Fault, Warned, image_name, warned
from kdcli.errors import DataError, KDError, MissingPathError


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
        where=str(root), dataset=None, faults=(fault,), warnings=(), bad_images=frozenset(), num_images=0, num_empty=0,
        num_boxes=0, num_crowd=0,
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


def shared_pictures(train: CheckReport, val: CheckReport) -> list[Warned]:
    """Files of val that are in train too: of the same bytes where both were read whole, else by folder and name."""
    assert train.dataset is not None
    assert val.dataset is not None
    ours = val.dataset
    kind = "image of val that is in train too: AP on it says little"
    if train.digests is not None and val.digests is not None:
        known = set(train.digests) - {b""}
        both = [image_name(ours, i) for i, digest in enumerate(val.digests) if digest in known]
    elif train.dataset.images_dir.resolve() == ours.images_dir.resolve():
        names = {plain_name(train.dataset.file_name(i)) for i in range(train.num_images)}
        both = [image_name(ours, i) for i in range(val.num_images) if plain_name(ours.file_name(i)) in names]
    else:
        both = []
    return warned(kind, both, loud=True)


def class_warnings(train: Dataset, val: Dataset) -> list[Warned]:
    """Classes with boxes in one split alone, or in none. Nothing when the splits do not have the same classes."""
    if train.classes.names != val.classes.names:
        return []
    seen = [np.isin(np.arange(len(s.classes)), s.annotations.category) for s in (train, val)]
    names = np.array([repr(name) for name in train.classes.names], dtype=object)
    return [
        *warned("class with boxes in val but none in train: it cannot be learnt", list(names[~seen[0] & seen[1]])),
        *warned("class with boxes in train but none in val: its AP is not defined", list(names[seen[0] & ~seen[1]])),
        *warned("class without a box in train and val", list(names[~seen[0] & ~seen[1]])),
    ]
