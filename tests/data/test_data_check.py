"""What the check of a data set finds, and what training refuses."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from kdcli.data.check import check_dataset
from kdcli.data.coco import Dataset, open_split
from kdcli.errors import DataError

Content = dict[str, Any]
Make = Callable[[Content], Dataset]


def _add(content: Content, id_: int, image_id: int, bbox: list[float], category_id: int = 3) -> None:
    content["annotations"].append(
        {"id": id_, "image_id": image_id, "category_id": category_id, "bbox": bbox, "area": 1, "iscrowd": 0}
    )


def test_a_sound_set(make_dataset: Make, content: Content) -> None:
    calls: list[tuple[int, int]] = []
    report = check_dataset(make_dataset(content), progress=lambda done, total: calls.append((done, total)))
    assert (report.faults, report.warnings, report.bad_images) == ((), (), frozenset())
    assert (report.num_images, report.num_empty, report.num_boxes, report.num_crowd) == (3, 1, 4, 1)
    assert calls == [(1, 3), (2, 3), (3, 3)]
    report.refuse(skip_bad=False)


def test_faults_of_files(make_dataset: Make, content: Content) -> None:
    dataset = make_dataset(content)
    (dataset.images_dir / "a.png").unlink()
    Image.new("RGB", (10, 11)).save(dataset.images_dir / "b.png")
    whole = (dataset.images_dir / "c.png").read_bytes()
    (dataset.images_dir / "c.png").write_bytes(whole[: len(whole) // 2])
    report = check_dataset(dataset)
    assert [(f.kind, f.image) for f in report.faults] == [
        ("missing image", 0),
        ("wrong image size", 1),
        ("corrupt image", 2),
    ]
    assert report.faults[0].where == "image 5 (a.png)"
    assert report.bad_images == {0, 1, 2}
    with pytest.raises(DataError, match="every image"):
        report.refuse(skip_bad=True)
    assert [f.kind for f in check_dataset(dataset, decode=False).faults] == ["missing image", "wrong image size"]


def test_a_file_name_that_leaves_the_folder(make_dataset: Make, content: Content) -> None:
    dataset = make_dataset(content)
    content["images"][0]["file_name"] = "../c.png"
    dataset.annotations_path.write_text(json.dumps(content))
    report = check_dataset(open_split(dataset.root, "train"))
    assert [(f.kind, f.image) for f in report.faults] == [("bad file name", 2)]


def test_faults_of_annotations(make_dataset: Make, content: Content) -> None:
    _add(content, 9, 42, [1, 1, 5, 5])  # id 9 is taken by a box of image 5
    _add(content, 20, 700, [1, 1, 5, 5], category_id=4)
    _add(content, 21, 12345, [1, 1, 5, 5])
    report = check_dataset(make_dataset(content))
    kinds = Counter(f.kind for f in report.faults)
    assert kinds == {"duplicate annotation id": 2, "unknown category": 1, "unknown image": 1}
    assert report.bad_images == {0, 1, 2}
    orphan = next(f for f in report.faults if f.kind == "unknown image")
    assert orphan.image is None
    assert "12345" in orphan.message


def test_duplicate_image_ids(make_dataset: Make, content: Content) -> None:
    content["images"][2]["id"] = 700
    report = check_dataset(make_dataset(content))
    assert [(f.kind, f.image) for f in report.faults] == [("duplicate image id", 1), ("duplicate image id", 2)]


def test_boxes_at_the_border(make_dataset: Make, content: Content) -> None:
    content["annotations"] = []
    boxes: list[list[float]] = [
        [50, 30, 12, 10],  # over by 2: clipped
        [-0.5, 0, 20, 20],  # over by 0.5: clipped
        [50, 30, 12.5, 10],  # over by 2.5
        [60, 0, 5, 5],  # outside, touching
        [-10, 0, 5, 5],  # outside
        [10, 10, 0.5, 20],  # thin
        [0, 0, 0, 0],  # thin, not outside
        [59.5, 0, 2, 5],  # half a pixel is left: thin
        [10, 10, -4, 3],  # negative: thin
    ]
    for id_, bbox in enumerate(boxes):
        _add(content, id_, 700, bbox)
    report = check_dataset(make_dataset(content))
    assert [(f.kind, f.where.split(" of ")[0]) for f in report.faults] == [
        ("box outside", "annotation 3"),
        ("box outside", "annotation 4"),
        ("box over the border", "annotation 2"),
    ]
    assert "2.5 px" in report.faults[2].message
    assert [(w.kind, w.count) for w in report.warnings] == [
        ("box over the border by up to 2 px, clipped", 2),
        ("box with a side under 1 px, dropped", 4),
    ]
    assert report.warnings[0].examples == ("annotation 0 of image 700 (c.png)", "annotation 1 of image 700 (c.png)")
    assert report.bad_images == {2}


def test_training_refuses_faults_unless_images_are_left_out(make_dataset: Make, content: Content) -> None:
    _add(content, 20, 700, [100, 100, 5, 5])
    report = check_dataset(make_dataset(content), decode=False)
    with pytest.raises(DataError, match=r"1 fault, first box outside: .*--skip-bad"):
        report.refuse(skip_bad=False)
    report.refuse(skip_bad=True)
    assert report.bad_images == {2}


@pytest.mark.parametrize("part", ["images", "categories"])
def test_nothing_to_train_on_cannot_be_skipped(make_dataset: Make, content: Content, part: str) -> None:
    report = check_dataset(make_dataset({**content, "annotations": [], part: []}))
    for skip_bad in (False, True):
        with pytest.raises(DataError, match=part):
            report.refuse(skip_bad)
