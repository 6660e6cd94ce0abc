"""AP of detections, measured by pycocotools, and the COCO result file whose direct pycocotools score is the same.

Numbers are rounded before they are scored, in ``coco_results``; the file then holds the very numbers that were scored.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcli.errors import DataError
from kdcli.files import atomic_write_text

BOX_DECIMALS = 3  # 0.001 pixels: far below what any IoU threshold can see
SCORE_DECIMALS = 6  # float32 scores of a confident detector differ in the sixth digit; fewer would make ties


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """COCO box metrics on the 0-100 scale; None where no ground truth of that kind exists (pycocotools' -1).

    ``ar`` is the average recall with at most 100 detections an image; ``per_class`` the AP of each class by its name.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_s: float | None
    ap_m: float | None
    ap_l: float | None
    ar: float | None
    per_class: dict[str, float | None]


def coco_results(
    image_id: int, boxes: NDArray[Any], scores: NDArray[Any], category_ids: Sequence[int] | NDArray[Any]
) -> list[dict[str, Any]]:
    """Detections of one image as COCO results, rounded as they will be written.

    ``boxes``: [D, 4] xyxy in pixels of the image; ``scores``: [D] in 0..1; ``category_ids``: [D] ids of the annotation
    file (not labels). Returns D dicts with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height) and ``score``.
    """
    x1, y1, x2, y2 = np.asarray(boxes, dtype=np.float64).reshape(-1, 4).T
    xywh = np.stack([x1, y1, x2 - x1, y2 - y1], axis=1)
    return [
        {
            "image_id": int(image_id),
            "category_id": int(category),
            "bbox": [round(value, BOX_DECIMALS) for value in box],
            "score": round(score, SCORE_DECIMALS),
        }
        for box, score, category in zip(
            xywh.tolist(), np.asarray(scores, dtype=np.float64).tolist(), category_ids, strict=True
        )
    ]


def write_detections(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write COCO results to ``path``, all or nothing. Raises NoSpaceError when the disk is full."""
    atomic_write_text(path, "[" + ",\n".join(json.dumps(result, allow_nan=False) for result in results) + "]\n")


def evaluate_detections(coco_gt: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Metrics:
    """Score box detections with pycocotools' COCOeval (maxDets 1, 10, 100).

    ``coco_gt``: a COCO annotation dict; every image in it counts, so it must hold the evaluated images only. Crowd
    boxes absorb detections as in COCO. ``results``: as ``coco_results`` makes them; none at all scores 0. Neither is
    changed.
    Raises DataError if a result names an image that ``coco_gt`` does not have.
    """
    strangers = {r["image_id"] for r in results} - {image["id"] for image in coco_gt["images"]}
    if strangers:
        raise DataError(f"detections of image {min(strangers)}, which the annotations do not list: use the same split")
    stats, precision = _pycocotools(coco_gt, results)
    names = _unique_names(coco_gt["categories"])
    # precision: [T IoU thresholds, R recalls, K categories by ascending id, 4 areas, 3 maxDets]; area 0 = all, -1 = 100
    per_class = {
        names[category]: _hundred(_mean_of_known(precision[:, :, k, 0, -1])) for k, category in enumerate(sorted(names))
    }
    ap, ap50, ap75, ap_s, ap_m, ap_l, _ar1, _ar10, ar = (_hundred(value) for value in stats[:9])
    return Metrics(ap=ap, ap50=ap50, ap75=ap75, ap_s=ap_s, ap_m=ap_m, ap_l=ap_l, ar=ar, per_class=per_class)


def _pycocotools(
    coco_gt: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> tuple[list[float], NDArray[np.float64]]:
    """COCOeval's twelve stats (0-1) and its precision array."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = _indexed(COCO(), coco_gt, coco_gt["annotations"])
        if results:
            found = truth.loadRes([dict(result) for result in results])
        else:  # loadRes reads the first result to learn its kind; an empty index is what it would have built
            found = _indexed(COCO(), coco_gt, [])
        run = COCOeval(truth, found, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [float(value) for value in run.stats], run.eval["precision"]


def _indexed(coco: Any, source: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]]) -> Any:
    """Fill an empty pycocotools COCO object; annotations are copied because COCOeval writes into them."""
    coco.dataset = {
        "info": source.get("info", {}),
        "images": list(source["images"]),
        "categories": list(source["categories"]),
        "annotations": [dict(annotation) for annotation in annotations],
    }
    coco.createIndex()
    return coco


def _unique_names(categories: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Category id -> name, with the id added to names that two categories share, so that none is lost."""
    shared = Counter(str(category["name"]) for category in categories)
    return {
        int(c["id"]): str(c["name"]) if shared[str(c["name"])] == 1 else f"{c['name']} ({c['id']})" for c in categories
    }


def _mean_of_known(values: NDArray[np.float64]) -> float:
    """Mean of the entries that are not -1, or -1 if there is none (pycocotools' own rule)."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _hundred(value: float) -> float | None:
    """Put a 0-1 score on the 0-100 scale; -1 becomes None."""
    return None if value < 0 else 100.0 * value
