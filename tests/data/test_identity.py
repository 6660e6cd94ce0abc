"""Names and ids that are there twice: categories, image files, and what tells classes apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from kdcli.classes import Category, ClassList, look_alike
from kdcli.data.check import CheckReport, check_dataset
from kdcli.data.check_splits import class_warnings, shared_pictures
from kdcli.data.coco import Dataset, coco_dict, open_split
from kdcli.errors import DataError
from tests.support.coco_records import box

Content = dict[str, Any]
Make = Callable[[Content], Dataset]


def _kinds(report: CheckReport) -> list[tuple[str, int, bool]]:
    return [(w.kind, w.count, w.loud) for w in report.warnings]


def _rewritten(dataset: Dataset, content: Content) -> Dataset:
    dataset.annotations_path.write_text(json.dumps(content))
    return open_split(dataset.root, dataset.split)


def test_an_unused_root_with_the_name_of_a_class_is_dropped(make_dataset: Make, content: Content) -> None:
    before = make_dataset(content)
    content["categories"].insert(0, {"id": 0, "name": "middle", "supercategory": "none"})
    dataset = _rewritten(before, content)
    assert dataset.classes == before.classes
    assert dataset.annotations.category.tolist() == before.annotations.category.tolist()
    assert [list(category) for category in dataset.fingerprint()["categories"]] == before.fingerprint()["categories"]
    assert coco_dict(dataset) == coco_dict(before)
    warning = check_dataset(dataset).warnings[0]
    assert (warning.count, warning.examples, warning.loud) == (1, ("'middle' (id 0)",), True)
    assert "has the name of another" in warning.kind


def test_the_root_is_dropped_where_neither_has_boxes(make_dataset: Make, content: Content) -> None:
    content["categories"] += [{"id": 0, "name": "none"}, {"id": 8, "name": "none"}]
    dataset = make_dataset(content)
    assert dataset.classes.ids == [3, 8, 17, 90]
    assert dataset.annotations.category.tolist() == [3, 2, 0, 3]


def test_two_categories_of_one_name_with_boxes_are_refused(make_dataset: Make, content: Content) -> None:
    content["categories"][0]["name"] = "middle"
    with pytest.raises(DataError, match=r"categories 17 \(1 boxes\) and 90 \(2 boxes\) have the same name 'middle'"):
        make_dataset(content)


@pytest.mark.parametrize("alike", ["FIRST", " first", "first\t", "\ufb01rst"])
def test_names_that_people_cannot_tell_apart_are_warned_of(make_dataset: Make, content: Content, alike: str) -> None:
    content["categories"][0]["name"] = alike
    dataset = make_dataset(content)
    (warning,) = (w for w in check_dataset(dataset).warnings if "differ by case" in w.kind)
    assert warning.loud
    assert warning.examples == (f"'first' (id 3) and {alike!r} (id 90)",)
    assert look_alike(alike, ["second", "first"]) == "first"
    assert look_alike("first", ["first", "second"]) is None


def test_a_class_list_has_each_id_and_name_once() -> None:
    good = ClassList([Category(1, "a"), Category(2, "b")])
    assert ClassList.from_json(good.to_json()) == good
    with pytest.raises(ValueError, match=r"2 classes have the name 'a' \(ids 1 and 2\)"):
        ClassList.from_json([{"id": 1, "name": "a"}, {"id": 2, "name": "a"}])
    with pytest.raises(ValueError, match="'a' and 'b' have the same id 1"):
        ClassList.from_json([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}])


@pytest.mark.parametrize("name", ["c.png", "./c.png", ".\\c.png"])
def test_one_file_with_and_without_boxes_is_a_fault(make_dataset: Make, content: Content, name: str) -> None:
    dataset = make_dataset(content)
    content["images"].append({**content["images"][0], "id": 701, "file_name": name})
    report = check_dataset(_rewritten(dataset, content))
    assert [(f.kind, f.image) for f in report.faults] == [
        ("one file, several image ids", 2),
        ("one file, several image ids", 3),
    ]
    assert "700 (3 boxes), 701 (0 boxes)" in report.faults[0].message
    with pytest.raises(DataError, match="several image ids"):
        report.refuse(skip_bad=False)


def test_one_file_with_the_same_boxes_twice_is_a_warning(make_dataset: Make, content: Content) -> None:
    dataset = make_dataset(content)
    content["images"].append({**content["images"][1], "id": 6})
    content["annotations"].append({**content["annotations"][1], "id": 77, "image_id": 6})
    report = check_dataset(_rewritten(dataset, content))
    assert report.faults == ()
    assert ("image whose file has another image id too, with the same boxes", 2, True) in _kinds(report)


def test_copies_of_a_file_under_other_names(make_dataset: Make, content: Content) -> None:
    content["images"] += [{**content["images"][1], "id": 6, "file_name": "copy.png"}]
    dataset = make_dataset(content)
    assert ("image whose very bytes another file has too, with other boxes", 2, True) in _kinds(check_dataset(dataset))
    content["annotations"].append({**content["annotations"][1], "id": 77, "image_id": 6})
    again = check_dataset(_rewritten(dataset, content))
    assert ("image whose very bytes another file has too", 2, False) in _kinds(again)


def _with_val(dataset: Dataset, content: Content) -> Dataset:
    shutil.copytree(dataset.images_dir, dataset.root / "val")
    (dataset.root / "annotations" / "val.json").write_text(json.dumps(content))
    return open_split(dataset.root, "val")


def test_images_of_train_in_val(make_dataset: Make, content: Content) -> None:
    train = make_dataset(content)
    val = _with_val(train, {**content, "images": content["images"][:2]})
    (warning,) = shared_pictures(check_dataset(train), check_dataset(val))
    assert warning.count == 2
    assert warning.loud
    headers = [check_dataset(split, decode=False) for split in (train, val)]
    assert shared_pictures(headers[0], headers[1]) == []  # other folders, and no bytes were read
    shutil.rmtree(val.images_dir)
    val.images_dir.symlink_to(train.images_dir)
    assert shared_pictures(headers[0], check_dataset(val, decode=False))[0].count == 2


def test_classes_with_boxes_in_one_split_alone(make_dataset: Make, content: Content) -> None:
    content["categories"].append({"id": 4, "name": "never"})
    train = make_dataset(content)
    val = _with_val(train, {**content, "annotations": [box(1, 700, 17, [1, 1, 9, 9])]})
    assert [(w.kind.split(":")[0], w.examples) for w in class_warnings(train, val)] == [
        ("class with boxes in train but none in val", ("'first'", "'last'")),
        ("class without a box in train and val", ("'never'",)),
    ]
    assert "none in train" in class_warnings(val, train)[0].kind


def test_backslashes_are_folders(make_dataset: Make, content: Content) -> None:
    dataset = make_dataset(content)
    (dataset.images_dir / "deep").mkdir()
    (dataset.images_dir / "a.png").rename(dataset.images_dir / "deep" / "a.png")
    content["images"][1]["file_name"] = "deep\\a.png"
    dataset = _rewritten(dataset, content)
    assert dataset.image_path(0) == dataset.images_dir / "deep" / "a.png"
    assert check_dataset(dataset).faults == ()
    literal = dataset.images_dir / "deep\\a.png"  # a name that Linux allows
    shutil.copy(dataset.image_path(0), literal)
    assert dataset.image_path(0) == literal


@pytest.mark.parametrize("name", ["deep\\..\\..\\a.png", "\\\\host\\share\\a.png", "C:a.png", "\\a.png"])
def test_backslashes_do_not_leave_the_folder(make_dataset: Make, content: Content, name: str) -> None:
    dataset = make_dataset(content)
    content["images"][1]["file_name"] = name
    with pytest.raises(DataError, match="plain path"):
        _rewritten(dataset, content).image_path(0)


def test_groups_of_look_alikes() -> None:
    groups = ClassList.numbered(["Dog", "cat", "dog "]).look_alikes()
    assert [[c.id for c in group] for group in groups] == [[1, 3]]
