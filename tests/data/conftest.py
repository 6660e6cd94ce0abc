"""Small COCO data sets on disk, and an index folder of their own for every test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdcli.data.coco import Dataset, open_split
from tests.support.coco_records import box

Content = dict[str, Any]


@pytest.fixture(autouse=True)
def index_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indices go to a folder of this test."""
    folder = tmp_path / "cache" / "index"
    monkeypatch.setenv("KDCLI_CACHE", str(folder.parent))
    return folder


@pytest.fixture
def content() -> Content:
    """Three images (ids out of order), category ids with gaps and out of order, one crowd box, one empty image."""
    return {
        "categories": [{"id": 90, "name": "last"}, {"id": 3, "name": "first"}, {"id": 17, "name": "middle"}],
        "images": [
            {"id": 700, "file_name": "c.png", "height": 40, "width": 60},
            {"id": 5, "file_name": "a.png", "height": 30, "width": 20},
            {"id": 42, "file_name": "b.png", "height": 10, "width": 10},
        ],
        "annotations": [
            box(11, 700, 17, [1, 2, 30, 20]),
            box(9, 5, 90, [0, 0, 10, 10]),
            box(12, 700, 3, [5, 5, 20, 20], iscrowd=1, area=77.5),
            box(10, 700, 90, [10.5, 5.25, 8, 9]),
        ],
    }


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[[Content], Dataset]:
    """Write ``content`` and an image for each of its records, and open it as the split ``train``."""

    def make(content: Content) -> Dataset:
        root = tmp_path / "set"
        (root / "annotations").mkdir(parents=True)
        (root / "train").mkdir()
        (root / "annotations" / "train.json").write_text(json.dumps(content))
        for record in content["images"]:
            pixels = np.full((record["height"], record["width"], 3), 99, dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / record["file_name"])
        return open_split(root, "train")

    return make
