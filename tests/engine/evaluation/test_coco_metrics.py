"""The numbers are pycocotools' own, also when the written file is scored directly."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kdcli.engine.evaluation.coco_metrics import Metrics, coco_results, evaluate_detections, write_detections
from kdcli.errors import DataError


def _truth(seed: int = 0, images: int = 12, crowd: bool = True) -> dict[str, Any]:
    rng = random.Random(seed)
    annotations: list[dict[str, Any]] = []
    for image in range(images):
        for _ in range(rng.randint(0, 6)):
            w, h = rng.choice([(12, 20), (50, 70), (150, 120)])
            x, y = rng.uniform(0, 320 - w), rng.uniform(0, 256 - h)
            is_crowd = int(crowd and rng.random() < 0.15)
            category = rng.choice([1, 3, 90])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image + 5,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": is_crowd,
                }
            )
    return {
        "images": [{"id": i + 5, "width": 320, "height": 256, "file_name": f"{i}.png"} for i in range(images)],
        "categories": [{"id": i, "name": n} for i, n in ((90, "dog"), (1, "cat"), (3, "bird"), (7, "never"))],
        "annotations": annotations,
    }


def _noisy(truth: dict[str, Any], seed: int = 1) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    results: list[dict[str, Any]] = []
    for image in truth["images"]:
        boxes = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        xyxy = np.array([[b[0], b[1], b[0] + b[2], b[1] + b[3]] for b in (a["bbox"] for a in boxes)]).reshape(-1, 4)
        false = rng.uniform(0, 120, (3, 4)) + np.array([0, 0, 120, 120])
        noisy = np.concatenate([xyxy + rng.normal(0, 4, xyxy.shape), false])
        categories = [a["category_id"] for a in boxes] + [1, 3, 90]
        results += coco_results(image["id"], noisy.astype(np.float32), rng.random(len(noisy)), categories)
    return results


def _direct(truth: dict[str, Any], file: Path, folder: Path) -> list[float]:
    """What a user gets who scores the file with pycocotools alone."""
    annotations = folder / "truth.json"
    annotations.write_text(json.dumps(truth))
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(annotations))
        run = COCOeval(gt, gt.loadRes(str(file)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [float(value) for value in run.stats]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_written_file_scores_identically(tmp_path: Path, seed: int) -> None:
    from kdcli.engine.evaluation.coco_metrics import _pycocotools

    truth = _truth(seed)
    results = _noisy(truth, seed)
    write_detections(tmp_path / "detections.json", results)
    stats = _direct(truth, tmp_path / "detections.json", tmp_path)
    assert _pycocotools(truth, results)[0] == stats  # all twelve, bit for bit
    metrics = evaluate_detections(truth, results)
    shown = (metrics.ap, metrics.ap50, metrics.ap75, metrics.ap_s, metrics.ap_m, metrics.ap_l, metrics.ar)
    assert shown == tuple(100 * value for value in (*stats[:6], stats[8]))
    assert metrics.ap is not None
    assert 0 < metrics.ap < 100


def test_ap_is_the_mean_over_classes_that_have_ground_truth() -> None:
    truth = _truth()
    metrics = evaluate_detections(truth, _noisy(truth))
    assert list(metrics.per_class) == ["cat", "bird", "never", "dog"]  # by category id
    assert metrics.per_class["never"] is None
    known = [value for value in metrics.per_class.values() if value is not None]
    assert metrics.ap == pytest.approx(sum(known) / len(known), abs=1e-9)


def test_crowd_absorbs_detections_and_is_never_missed() -> None:
    box = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0, "id": 1}
    crowd = {"image_id": 1, "category_id": 1, "bbox": [100, 0, 100, 100], "area": 10000, "iscrowd": 1, "id": 2}
    truth = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "cat"}], "annotations": [box, crowd]}
    inside = np.array([[110, 10, 140, 40], [150, 10, 190, 60]])
    results = coco_results(1, inside, np.array([0.9, 0.8]), [1, 1]) + coco_results(
        1, np.array([[10, 10, 50, 50]]), np.array([0.5]), [1]
    )
    assert evaluate_detections(truth, results).ap == pytest.approx(100)
    plain = copy.deepcopy(truth)
    plain["annotations"] = [box]
    ap = evaluate_detections(plain, results).ap
    assert ap is not None
    assert ap < 50


def test_no_detections_score_zero_and_no_ground_truth_scores_nothing() -> None:
    truth = _truth()
    empty = evaluate_detections(truth, [])
    assert (empty.ap, empty.ar, empty.per_class["cat"], empty.per_class["never"]) == (0.0, 0.0, 0.0, None)
    bare = {**truth, "annotations": []}
    assert evaluate_detections(bare, []) == Metrics(
        **dict.fromkeys(("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l", "ar")),
        per_class=dict.fromkeys(("cat", "bird", "never", "dog")),
    )
    assert evaluate_detections(bare, _noisy(truth)).ap is None


def test_inputs_stay_as_they_were_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    truth = _truth()
    results = _noisy(truth)
    before = copy.deepcopy((truth, results))
    evaluate_detections(truth, results)
    assert (truth, results) == before
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_results_are_rounded_and_survive_the_file(tmp_path: Path) -> None:
    boxes = np.array([[1 / 3, 2 / 3, 100 / 3, 50.005]], dtype=np.float32)
    results = coco_results(7, boxes, np.array([0.123456789], dtype=np.float32), [3])
    assert results == [{"image_id": 7, "category_id": 3, "bbox": [0.333, 0.667, 33.0, 49.338], "score": 0.123457}]
    write_detections(tmp_path / "detections.json", results)
    assert json.loads((tmp_path / "detections.json").read_text()) == results
    assert [p.name for p in tmp_path.iterdir()] == ["detections.json"]
    write_detections(tmp_path / "detections.json", [])
    assert json.loads((tmp_path / "detections.json").read_text()) == []
    assert coco_results(7, np.zeros((0, 4)), np.zeros(0), []) == []


def test_unknown_image_and_shared_class_names() -> None:
    truth = _truth()
    with pytest.raises(DataError, match="image 99"):
        evaluate_detections(truth, coco_results(99, np.array([[0, 0, 9, 9]]), np.array([0.5]), [1]))
    truth["categories"][3]["name"] = "cat"
    assert list(evaluate_detections(truth, []).per_class) == ["cat (1)", "bird", "cat (7)", "dog"]
