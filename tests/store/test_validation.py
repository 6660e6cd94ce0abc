"""The fields of an engine's manifest by which a run goes: each, when it is of another kind, is named in one line."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from kdcli.geometry.assign import AssignerSpec
from kdcli.geometry.regions import RegionSpec
from kdcli.store.validation import check_manifest
from tests.support.hostile_case import set_at

MANIFEST: dict[str, Any] = {
    "views": ["identity"],
    "schema": {},
    "teacher": {
        "model": {"detector": "gfl", "backbone": "resnet50"},
        "weights_sha256": "00",
        "ap": 40.0,
        "specs": {"features": {"per": "cell", "dims": [64]}},
    },
    "teacher_run": {},
    "assigner": AssignerSpec("atss").to_json(),
    "regions": RegionSpec().to_json(),
    "class_order": [0, 1],
    "dataset": {"left_out": []},
}
WRONG: dict[str, list[Any]] = {
    "teacher": [5, [], "gfl"],
    "teacher.model": [5, "gfl", {}],
    "teacher.model.detector": [None, 5],
    "teacher.ap": ["40", float("nan"), True],
    "teacher.specs": [[], None],
    "teacher.specs.features": [5, {}, {"per": "cell", "dims": [2**40]}, {"per": 5, "dims": [1]}],
    "teacher_run": [5, None],
    "assigner": [5, {}, {"kind": "none", "other": 1}],
    "assigner.kind": [5, "best", None, ["atss"]],
    "assigner.topk": [9.0, "9", True, 0],
    "assigner.ranges": [["64"], 64, None, [64, 32], [64, float("inf")]],
    "regions": [[], {"vlr_gama": 0.25}],
    "regions.vlr_metric": ["iou", 5, ["diou"]],
    "regions.vlr_gamma": ["0.25", None, float("nan"), 2],
    "regions.vlr_alpha": ["0.5", float("inf"), [0.5]],
    "regions.vlr_topk": [2.5, None],
    "regions.vlr_keep_positives": [1, "yes"],
    "class_order": [["0"], [True], 5],
    "dataset.left_out": [5, ["1"]],
}


def test_a_right_manifest_passes() -> None:
    check_manifest(MANIFEST)
    check_manifest(set_at(MANIFEST, "regions.vlr_alpha", 0.5))
    check_manifest(set_at(MANIFEST, "regions.vlr_gamma", 1))  # a whole number is a float too
    older = copy.deepcopy(MANIFEST)
    del older["regions"]["keep"]  # an option that it was written without
    check_manifest(older)


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in WRONG.items() for value in values])
def test_a_field_of_another_kind_is_refused(path: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"^impossible "):
        check_manifest(set_at(MANIFEST, path, value))
