"""Each box is allowed, and the sum is not: nothing to train on, boxes in another form, areas that cannot be, clipping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kdcli.data.check import check_dataset
from kdcli.data.coco import Dataset, coco_dict
from kdcli.data.reading import Reading
from kdcli.errors import DataError
from tests.support.coco_records import box

Content = dict[str, Any]
Make = Callable[[Content], Dataset]
NO_BOX: list[tuple[str, list[dict[str, Any]], str]] = [
    ("none", [], "there is no annotation"),
    (
        "crowd",
        [box(1, 700, 3, [1, 1, 9, 9], iscrowd=1), box(2, 5, 3, [1, 1, 9, 9], iscrowd=1)],
        "all 2 boxes are crowd",
    ),
    ("relative", [box(1, 700, 3, [0.1, 0.2, 0.5, 0.25]), box(2, 5, 3, [0, 0, 1, 1])], "all 2 boxes lie within 0..1"),
    ("zero", [box(1, 700, 3, [5, 5, 0, 0]), box(2, 5, 3, [5, 5, 0, 9])], "all 2 boxes have a side under 1 pixel"),
    ("outside", [box(1, 700, 3, [500, 5, 9, 9]), box(2, 5, 3, [5, -50, 9, 9])], "all 2 boxes lie wholly outside"),
    ("unknown", [box(1, 700, 1, [1, 1, 9, 9])], "the only box have a category_id that 'categories' does not list"),
    ("orphans", [box(1, 1, 3, [1, 1, 9, 9])], "all 1 annotations are on images that 'images' does not list"),
    (
        "mixed",
        [box(1, 700, 3, [5, 5, 0, 0]), box(2, 700, 3, [0.1, 0.2, 0.5, 0.25]), box(3, 5, 3, [1, 1, 9, 9], iscrowd=1)],
        "of 2 boxes 1 lie within 0..1: relative coordinates; multiply them by width and height; 1 have a side under",
    ),
]


@pytest.mark.parametrize(("annotations", "reason"), [case[1:] for case in NO_BOX], ids=[case[0] for case in NO_BOX])
def test_no_box_to_train_on_is_refused(
    make_dataset: Make, content: Content, annotations: list[dict[str, Any]], reason: str
) -> None:
    dataset = make_dataset({**content, "annotations": annotations})
    report = check_dataset(dataset, decode=False)
    for skip_bad in (False, True):
        with pytest.raises(DataError, match="no box to train on: ") as caught:
            report.refuse(skip_bad)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("annotations", "reason"), [case[1:] for case in NO_BOX], ids=[case[0] for case in NO_BOX])
def test_a_split_to_score_on_may_be_unlabelled_but_not_wrong(
    make_dataset: Make, content: Content, annotations: list[dict[str, Any]], reason: str
) -> None:
    report = check_dataset(make_dataset({**content, "annotations": annotations}), decode=False, trains=False)
    if reason.startswith(("there is no annotation", "all 2 boxes are crowd")):
        report.refuse(skip_bad=False)
        assert report.warnings[0].loud
        assert reason in str(report.warnings[0])
    else:
        with pytest.raises(DataError, match="no box to score on: "):
            report.refuse(skip_bad=False)


def test_boxes_on_faulty_images_alone(make_dataset: Make, content: Content) -> None:
    dataset = make_dataset({**content, "annotations": [box(1, 700, 3, [1, 1, 9, 9])]})
    (dataset.images_dir / "c.png").write_bytes(b"no picture")
    report = check_dataset(dataset)
    report.refuse(skip_bad=True)
    with pytest.raises(DataError, match="every image with a box to train on has a fault, first corrupt image"):
        report.refuse_without_boxes()


def _many(content: Content, boxes: list[list[float]]) -> Content:
    return {**content, "annotations": [box(k, 700, 3, b) for k, b in enumerate(boxes, 1)]}


def test_corners_instead_of_sizes_are_named(make_dataset: Make, content: Content) -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, (45, 25), (40, 2))
    high = low + rng.uniform(5, 15, (40, 2))
    dataset = make_dataset(_many(content, np.concatenate([low, high], axis=1).tolist()))  # images of 40x60
    for reading in (Reading(), Reading(clip_boxes=True)):
        report = check_dataset(dataset, decode=False, reading=reading)
        assert report.faults[0].kind == "boxes in another form"
        for skip_bad in (False, True):
            with pytest.raises(DataError, match=r"\d+ of 40 boxes run over the border, and 40 fit .* x2 - x1"):
                report.refuse(skip_bad)
    sizes = np.concatenate([low, high - low], axis=1).tolist()
    again = check_dataset(replace(dataset, annotations=make_again(dataset, sizes)), decode=False)
    assert again.faults == ()


def make_again(dataset: Dataset, boxes: list[list[float]]) -> Any:
    return replace(dataset.annotations, boxes_xywh=np.array(boxes), area=np.array([b[2] * b[3] for b in boxes]))


@pytest.mark.parametrize(("bad", "loud"), [(1, False), (2, True)])
def test_many_dropped_boxes_are_said_at_the_start(make_dataset: Make, content: Content, bad: int, loud: bool) -> None:
    boxes = [[5.0, 5.0, 9.0, 9.0]] * (19 - bad) + [[5.0, 5.0, 0.5, 9.0]] * bad
    (warning,) = check_dataset(make_dataset(_many(content, boxes)), decode=False).warnings
    assert (warning.kind, warning.count, warning.loud) == ("box with a side under 1 px, dropped", bad, loud)


def test_some_relative_boxes_are_named(make_dataset: Make, content: Content) -> None:
    boxes = [[5.0, 5.0, 9.0, 9.0]] * 3 + [[0.2, 0.5, 0.3, 0.4]] * 3
    (warning,) = check_dataset(make_dataset(_many(content, boxes)), decode=False).warnings
    assert "relative coordinates" in warning.kind
    assert (warning.count, warning.loud) == (3, True)


def test_areas_that_cannot_be(make_dataset: Make, content: Content) -> None:
    bad = [-4.0, 0.0, 41.0 * 60, 250.0, 1e300]
    good = [100.0, 37.5, 0.5, 121.0, 200.0]
    content["annotations"] = [box(k, 700, 3, [1, 1, 10, 10], area=area) for k, area in enumerate(bad + good, 1)]
    content["annotations"].append(
        box(99, 700, 3, [1, 1, 0, 5], area=0.0)
    )  # nothing of a thin box is no fault of its area
    dataset = make_dataset(content)
    (warning,) = (w for w in check_dataset(dataset, decode=False).warnings if "'area'" in w.kind)
    assert (warning.count, warning.loud) == (len(bad), True)
    areas = [a["area"] for a in coco_dict(dataset)["annotations"]]
    assert areas == [100.0] * len(bad) + good + [0.0]


def test_clipped_boxes(make_dataset: Make, content: Content) -> None:
    content["annotations"] = [
        box(1, 700, 3, [50, 30, 30, 30]),  # of an image of 40x60
        box(2, 700, 3, [-20, -20, 60, 60], area=50.0),
        box(3, 700, 3, [80, 5, 9, 9]),
        box(4, 700, 3, [5, 5, 9, 9]),
    ]
    dataset = make_dataset(content)
    kinds = [f.kind for f in check_dataset(dataset, decode=False).faults]
    assert kinds == ["box outside", "box over the border", "box over the border"]
    with pytest.raises(DataError, match="--clip-boxes"):
        check_dataset(dataset, decode=False).refuse(skip_bad=False)
    report = check_dataset(dataset, decode=False, reading=Reading(clip_boxes=True))
    assert report.faults == ()
    assert [(w.count, w.loud) for w in report.warnings] == [(2, True), (1, True)]
    assert report.dataset is not None
    assert report.dataset.fingerprint() == {**dataset.fingerprint(), "boxes": "clipped"}
    truth = [(a["bbox"], a["area"]) for a in coco_dict(report.dataset)["annotations"]]
    assert truth == [([50, 30, 10, 10], 100), ([0, 0, 40, 40], 50), ([5, 5, 9, 9], 81)]
    trained = [[50, 30, 60, 40], [0, 0, 40, 40], [5, 5, 14, 14]]
    assert report.dataset.training_boxes(2)[0].tolist() == trained


def test_clipping_what_needs_none_changes_nothing(make_dataset: Make, content: Content) -> None:
    dataset = make_dataset(content)
    report = check_dataset(dataset, decode=False, reading=Reading(clip_boxes=True))
    assert report.dataset is not None
    assert report.dataset.fingerprint() == dataset.fingerprint()
    assert coco_dict(report.dataset) == coco_dict(dataset)
