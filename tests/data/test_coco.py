"""COCO files: order, gaps, crowd, layouts, what is refused, and the index."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kdcli.classes import Category
from kdcli.data import coco_index
from kdcli.data.coco import Dataset, coco_dict, has_split, load_annotations, open_split
from kdcli.errors import DataError, MissingPathError, OptionError

Content = dict[str, Any]
Make = Callable[[Content], Dataset]


def test_images_boxes_and_classes_are_in_the_order_of_their_ids(make_dataset: Make, content: Content) -> None:
    dataset = make_dataset(content)
    assert dataset.annotations.image_ids.tolist() == [5, 42, 700]
    assert [dataset.file_name(i) for i in range(3)] == ["a.png", "b.png", "c.png"]
    assert [dataset.image_size(i) for i in range(3)] == [(30, 20), (10, 10), (40, 60)]
    assert dataset.classes == (Category(3, "first"), Category(17, "middle"), Category(90, "last"))
    assert dataset.annotations.box_offsets.tolist() == [0, 1, 1, 4]
    assert dataset.annotations.annotation_ids.tolist() == [9, 11, 12, 10]
    assert dataset.index_of(700) == 2
    with pytest.raises(DataError, match="no image with the id 6"):
        dataset.index_of(6)


def test_crowd_boxes_are_not_trained_on(make_dataset: Make, content: Content) -> None:
    boxes, labels = make_dataset(content).training_boxes(2)
    assert labels.tolist() == [1, 2]
    assert boxes.tolist() == [[1, 2, 31, 22], [10.5, 5.25, 18.5, 14.25]]
    assert boxes.dtype == np.float32
    assert labels.dtype == np.int64


def test_an_image_without_boxes(make_dataset: Make, content: Content) -> None:
    boxes, labels = make_dataset(content).training_boxes(1)
    assert (boxes.shape, labels.shape) == ((0, 4), (0,))


def test_training_boxes_are_clipped_and_thin_or_unknown_ones_dropped(make_dataset: Make, content: Content) -> None:
    base = {"iscrowd": 0, "area": 1, "image_id": 5}
    content["annotations"] = [
        {**base, "id": 1, "category_id": 3, "bbox": [-2, 25, 10, 7]},
        {**base, "id": 2, "category_id": 3, "bbox": [19.5, 0, 10, 10]},
        {**base, "id": 3, "category_id": 4, "bbox": [1, 1, 9, 9]},
        {**base, "id": 4, "category_id": 3, "bbox": [1, 1, 0, 9]},
    ]
    boxes, labels = make_dataset(content).training_boxes(0)
    assert boxes.tolist() == [[0, 25, 8, 30]]
    assert labels.tolist() == [0]


def test_coco_dict_hands_crowd_boxes_to_pycocotools(make_dataset: Make, content: Content) -> None:
    content["annotations"][0]["id"] = 0  # pycocotools takes 0 for "unmatched"
    truth = COCO()
    truth.dataset = coco_dict(make_dataset(content))
    truth.createIndex()
    crowd = truth.loadAnns(truth.getAnnIds(imgIds=[700], iscrowd=True))
    assert [(a["bbox"], a["area"], a["category_id"]) for a in crowd] == [([5.0, 5.0, 20.0, 20.0], 77.5, 3)]
    assert sorted(truth.getCatIds()) == [3, 17, 90]
    found = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in truth.dataset["annotations"]
        if not a["iscrowd"]
    ]
    evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_both_layouts_are_found(tmp_path: Path, content: Content) -> None:
    (tmp_path / "annotations").mkdir()
    for name in ("train.json", "instances_val2017.json"):
        (tmp_path / "annotations" / name).write_text(json.dumps(content))
    (tmp_path / "train").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "val2017").symlink_to("elsewhere")  # a linked image folder is the owner's choice
    assert open_split(tmp_path, "train").images_dir == tmp_path / "train"
    val = open_split(tmp_path, "val")
    assert val.image_path(0) == tmp_path / "val2017" / "a.png"
    assert has_split(tmp_path, "val")
    assert not has_split(tmp_path, "test")


def test_what_was_looked_for_is_named(tmp_path: Path, content: Content) -> None:
    with pytest.raises(MissingPathError, match="does not exist"):
        open_split(tmp_path / "none", "train")
    with pytest.raises(MissingPathError, match=r"annotations/val\.json .* annotations/instances_val2017\.json"):
        open_split(tmp_path, "val")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "val.json").write_text(json.dumps(content))
    with pytest.raises(MissingPathError, match="image folder"):
        open_split(tmp_path, "val")
    with pytest.raises(OptionError, match="plain name"):
        open_split(tmp_path, "../val")


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "x/../../a.png", "a\0.png", "", "C:\\a.png", "..\\a.png"])
def test_file_names_that_leave_the_folder_are_refused(make_dataset: Make, content: Content, name: str) -> None:
    dataset = make_dataset({**content, "images": [], "annotations": []})
    content["images"][1]["file_name"] = name
    dataset.annotations_path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="file_name"):
        open_split(dataset.root, "train").image_path(0)


def test_the_fingerprint_tells_data_sets_apart(make_dataset: Make, content: Content) -> None:
    dataset = make_dataset(content)
    first = dataset.fingerprint()
    assert first["categories"] == [[3, "first"], [17, "middle"], [90, "last"]]
    assert first["num_images"] == 3
    assert json.loads(json.dumps(first)) == first
    content["annotations"].pop()
    dataset.annotations_path.write_text(json.dumps(content))
    assert open_split(dataset.root, "train").fingerprint()["annotations_sha256"] != first["annotations_sha256"]
    assert pickle.loads(pickle.dumps(dataset)).fingerprint() == first  # worker processes get it so


def _without(part: str) -> Callable[[Content], None]:
    return lambda content: content.__delitem__(part)


def _set(part: str, key: str, value: Any) -> Callable[[Content], None]:
    return lambda content: content[part][0].__setitem__(key, value)


BAD = {
    "no images": (_without("images"), "'images'"),
    "no annotations": (_without("annotations"), "'annotations'"),
    "no categories": (_without("categories"), "'categories'"),
    "no bbox": (lambda c: c["annotations"][1].__delitem__("bbox"), r"annotations\[1\] \(id 9\).*'bbox'"),
    "NaN": (_set("annotations", "bbox", [1, float("nan"), 2, 3]), "annotation 11: bbox"),
    "infinite": (_set("annotations", "bbox", [1, 1e999, 2, 3]), "annotation 11: bbox"),
    "NaN area": (_set("annotations", "area", float("nan")), "annotation 11: area"),
    "three numbers": (_set("annotations", "bbox", [1, 2, 3]), "four finite numbers"),
    "text in the box": (_set("annotations", "bbox", [1, 2, 3, "4"]), "four finite numbers"),
    "text id": (_set("images", "id", "a1"), r"images\[0\]"),
    "huge id": (_set("images", "id", 2**70), r"images\[0\]"),
    "no height": (_set("images", "height", None), "image 700 needs 'height'"),
    "crowd": (_set("annotations", "iscrowd", 7), "iscrowd"),
    "no name": (_set("categories", "name", None), r"categories\[0\]"),
    "category twice": (_set("categories", "id", 3), "two categories have the id 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_files_are_one_line_errors(tmp_path: Path, content: Content, case: str) -> None:
    change, message = BAD[case]
    change(content)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        load_annotations(path)
    assert "\n" not in str(caught.value)
    assert "bad.json" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_not_coco_json_at_all(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"bad\.json"):
        load_annotations(path)


def test_optional_parts_may_be_missing(tmp_path: Path, content: Content) -> None:
    for record in content["annotations"]:
        del record["iscrowd"], record["area"]
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(content), encoding="utf-8")  # with a byte-order mark
    notes = load_annotations(path)
    assert not notes.crowd.any()
    assert notes.area.tolist() == [100, 600, 400, 72]


def test_annotations_of_unlisted_images_are_kept_apart(tmp_path: Path, content: Content) -> None:
    content["annotations"][1]["image_id"] = 9999
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    notes = load_annotations(path)
    assert notes.orphans.tolist() == [[9, 9999]]
    assert notes.annotation_ids.tolist() == [11, 12, 10]


def test_the_second_open_reads_the_index(
    make_dataset: Make, content: Content, index_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_dataset(content)
    assert [p.name for p in index_folder.iterdir()] == [f"{first.annotations.sha256}.npz"]

    def never(path: Path) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr(coco_index, "parse_coco", never)
    again = open_split(first.root, "train").annotations
    for name in coco_index.ARRAYS:
        a, b = getattr(first.annotations, name), getattr(again, name)
        assert a.dtype == b.dtype, name
        assert np.array_equal(a, b), name
    assert again.categories == first.classes
    first.annotations_path.write_text(json.dumps(content) + " ")
    with pytest.raises(AssertionError, match="parsed again"):
        open_split(first.root, "train")


def test_a_damaged_index_is_made_again(make_dataset: Make, content: Content, index_folder: Path) -> None:
    dataset = make_dataset(content)
    index = index_folder / f"{dataset.annotations.sha256}.npz"
    good = index.read_bytes()
    for bad in (b"", good[: len(good) // 2], good.replace(b"image_ids", b"image_xxx")):
        index.write_bytes(bad)
        assert open_split(dataset.root, "train").annotations.box_offsets.tolist() == [0, 1, 1, 4]
        assert index.read_bytes() == good


def test_no_place_for_the_index(make_dataset: Make, content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(content)
    monkeypatch.setenv("KDCLI_CACHE", str(dataset.annotations_path))  # a file, so no folder can be made in it
    assert open_split(dataset.root, "train").num_images == 3
    monkeypatch.setattr(coco_index, "CHILD_FROM_BYTES", 0)
    assert open_split(dataset.root, "train").num_images == 3


@pytest.mark.parametrize("child_from", [0, 10**9])
def test_a_user_without_a_home(
    make_dataset: Make, content: Content, monkeypatch: pytest.MonkeyPatch, child_from: int
) -> None:
    """`docker --user 12345` without HOME: the system's list of users does not know the number either."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    dataset = make_dataset(content)
    for name in ("KDCLI_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(coco_index, "CHILD_FROM_BYTES", child_from)
    assert coco_index.index_dir() is None
    assert open_split(dataset.root, "train").annotations.box_offsets.tolist() == [0, 1, 1, 4]


def test_a_child_process_parses_large_files_and_reports_in_one_line(
    make_dataset: Make, content: Content, index_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coco_index, "CHILD_FROM_BYTES", 0)
    dataset = make_dataset(content)
    assert dataset.annotations.box_offsets.tolist() == [0, 1, 1, 4]
    assert len(list(index_folder.iterdir())) == 1
    del content["categories"]
    dataset.annotations_path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="has no list 'categories'") as caught:
        open_split(dataset.root, "train")
    assert "\n" not in str(caught.value)


def test_a_large_file_is_parsed_once(tmp_path: Path, index_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.json"
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640} for i in range(20_000)]
    template = '{"id":%d,"image_id":%d,"category_id":1,"bbox":[1.5,2.25,30,40],"area":1200,"iscrowd":0}'
    boxes = ",".join(template % (i, i % 20_000) for i in range(140_000))
    path.write_text(f'{{"categories":[{{"id":1,"name":"a"}}],"images":{json.dumps(images)},"annotations":[{boxes}]}}')
    load_annotations(path)
    monkeypatch.delattr(coco_index, "parse_coco")
    monkeypatch.delattr(coco_index, "_parse_in_child")
    notes = load_annotations(path)
    (index,) = index_folder.iterdir()
    assert index.stat().st_size < 0.8 * path.stat().st_size  # what the second time reads, beside the file's hash
    assert (len(notes.image_ids), len(notes.area)) == (20_000, 140_000)
    assert notes.file_name(19_999) == "000000019999.jpg"


def test_opening_a_split_does_not_import_torch() -> None:
    code = "import sys, kdcli.data.check, kdcli.data.shapes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
