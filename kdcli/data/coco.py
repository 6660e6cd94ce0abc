"""A split of a data set: its folder layout, its images, and its annotations as compact arrays.

Two layouts are found under a root: ``annotations/SPLIT.json`` with ``SPLIT/`` beside it, and COCO's own
``annotations/instances_SPLIT2017.json`` with ``SPLIT2017/``. Classes are the categories in the order of their ids,
numbered 0..K-1. Crowd boxes are never trained on; `coco_dict` hands them to pycocotools as crowd.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcli.classes import ClassList
from kdcli.data.coco_boxes import MIN_SIDE, clip_xyxy, outside, owners, usable_area
from kdcli.data.coco_index import Annotations, load_annotations
from kdcli.data.coco_names import with_distinct_names
from kdcli.errors import DataError, MissingPathError, OptionError

__all__ = ["Annotations", "Dataset", "coco_dict", "has_split", "load_annotations", "open_split"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split: where its images are and what is annotated on them. Image ``i`` is the i-th by ascending id."""

    root: Path
    split: str
    images_dir: Path
    annotations_path: Path
    annotations: Annotations
    exif: bool = True  # the EXIF orientation is applied where the turned image has the annotated size
    clip: bool = False  # boxes beyond the border are clipped, for training and for scoring

    @property
    def num_images(self) -> int:
        """Number of images, with or without boxes."""
        return len(self.annotations.image_ids)

    @property
    def classes(self) -> ClassList:
        """The categories; a label is a position in this list."""
        return self.annotations.categories

    def image_id(self, i: int) -> int:
        """The annotation file's id of image ``i``."""
        return int(self.annotations.image_ids[i])

    def image_size(self, i: int) -> tuple[int, int]:
        """(height, width) of image ``i`` in pixels, as the annotation file says."""
        return int(self.annotations.heights[i]), int(self.annotations.widths[i])

    def file_name(self, i: int) -> str:
        """The file name of image ``i``, relative to ``images_dir``."""
        return self.annotations.file_name(i)

    def image_path(self, i: int) -> Path:
        """Where image ``i`` lies. Raises DataError for a name that would leave the image folder.

        A name with backslashes, as Windows writes it, means folders, unless a file of this very name is there. Links inside
        the folder, or the folder itself being one, are the owner's choice and are followed.
        """
        name = self.file_name(i)
        windows = PureWindowsPath(name)  # splits at / and \ alike, so that a store moves between systems
        rooted = PurePosixPath(name).is_absolute() or windows.drive or windows.root
        if not windows.parts or rooted or ".." in windows.parts or "\0" in name:
            raise DataError(
                f"{self.annotations_path}: image {self.image_id(i)} has the file_name {name!r}, which is not a plain "
                f"path inside {self.images_dir}; correct it"
            )
        path = self.images_dir / name
        if "\\" in name and not path.exists():
            return self.images_dir.joinpath(*windows.parts)
        return path

    def index_of(self, image_id: int) -> int:
        """The position of the image with this id. Raises DataError when there is none."""
        i = int(np.searchsorted(self.annotations.image_ids, image_id))
        if i == self.num_images or self.annotations.image_ids[i] != image_id:
            raise DataError(f"{self.annotations_path} has no image with the id {image_id}")
        return i

    def fingerprint(self) -> dict[str, Any]:
        """What tells two data sets apart, as JSON: hash of the annotations, categories in order, number of images, and
        what ``reading`` says.
        """
        return {
            "annotations_sha256": self.annotations.sha256,
            "categories": [[c.id, c.name] for c in self.classes],
            "num_images": self.num_images,
            **self.reading(),
        }

    def reading(self) -> dict[str, str]:
        """In what it is not read as usual: pixels or boxes that the files alone would not give. Empty for most."""
        return {**({} if self.exif else {"exif": "ignored"}), **({"boxes": "clipped"} if self.clip else {})}

    def box_rows(self, i: int) -> slice:
        """The rows of image ``i`` in the box arrays of ``annotations``."""
        return slice(*(int(v) for v in self.annotations.box_offsets[i : i + 2]))

    def training_boxes(self, i: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """What image ``i`` is trained on: boxes [G, 4] xyxy image pixels and labels [G] in 0..K-1.

        Left out: crowd, unknown categories, and what is thinner than 1 pixel once clipped to the image.
        """
        rows = self.box_rows(i)
        height, width = self.image_size(i)
        xyxy = clip_xyxy(self.annotations.boxes_xywh[rows], height, width)
        labels = self.annotations.category[rows]
        wide = (xyxy[:, 2:] - xyxy[:, :2] >= MIN_SIDE).all(axis=1)
        keep = wide & ~self.annotations.crowd[rows] & (labels >= 0)
        return xyxy[keep].astype(np.float32), labels[keep].astype(np.int64)


def has_split(root: Path, split: str) -> bool:
    """True when ``root`` holds the annotation file of ``split`` in one of the two layouts."""
    return any(annotations.is_file() for annotations, _ in _layouts(Path(root), split))


def open_split(root: Path, split: str) -> Dataset:
    """Open ``split`` of the data set under ``root``.

    Raises MissingPathError naming what was looked for, and DataError when the JSON is no COCO detection file, or has two
    categories of one name with boxes.
    """
    root = Path(root)
    if not root.is_dir():
        wrong = "is not a folder; name the one that holds annotations/" if root.exists() else "does not exist"
        raise MissingPathError(f"data folder {root} {wrong}")
    layouts = _layouts(root, split)
    for annotations_path, images_dir in layouts:
        if annotations_path.is_file():
            if not images_dir.is_dir():
                raise MissingPathError(f"{annotations_path} is there, but not its image folder {images_dir}")
            notes = with_distinct_names(load_annotations(annotations_path), annotations_path)
            return Dataset(root, split, images_dir, annotations_path, notes)
    for annotations_path, _ in layouts:
        if annotations_path.exists():
            raise DataError(f"{annotations_path} is not a file; put the annotations of {split} there")
    looked = " nor ".join(f"{a.relative_to(root)} with {d.name}/" for a, d in layouts)
    raise MissingPathError(f"no split '{split}' under {root}: found neither {looked}")


def _layouts(root: Path, split: str) -> tuple[tuple[Path, Path], ...]:
    if not split or Path(split).name != split or "\\" in split:
        raise OptionError(f"split '{split}' is not a plain name, e.g. train or val")
    return (
        (root / "annotations" / f"{split}.json", root / split),
        (root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"),
    )


def coco_dict(dataset: Dataset) -> dict[str, Any]:
    """The split as a dictionary for ``pycocotools.coco.COCO().dataset``, crowd boxes included, boxes as in the file.

    Image and category ids are the file's own. Annotations are numbered 1..M in the order of the arrays, because
    pycocotools takes an annotation with the id 0 for an unmatched one and merges those that share an id. An area that
    cannot be is the box's own; with ``clip`` boxes end at the border, and those outside are left out.
    """
    notes = dataset.annotations
    owner = owners(notes)
    boxes, area = notes.boxes_xywh, usable_area(notes)
    rows = np.flatnonzero(notes.category >= 0)
    if dataset.clip:
        corners = clip_xyxy(boxes, notes.heights[owner], notes.widths[owner])
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        area = np.minimum(area, np.maximum(boxes[:, 2:], 0).prod(axis=1))
        rows = rows[~outside(notes)[rows]]
    annotations = [
        {
            "id": row + 1,
            "image_id": int(notes.image_ids[owner[row]]),
            "category_id": dataset.classes[notes.category[row]].id,
            "bbox": boxes[row].tolist(),
            "area": float(area[row]),
            "iscrowd": int(notes.crowd[row]),
        }
        for row in rows.tolist()
    ]
    images = [
        {"id": dataset.image_id(i), "file_name": dataset.file_name(i), "height": h, "width": w}
        for i in range(dataset.num_images)
        for h, w in (dataset.image_size(i),)
    ]
    categories = dataset.classes.to_json()
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
