"""The manifest: what it reads it writes back, what is of another kind is named in one line, and how two are told apart."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdcli.errors import StoreError
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec
from kdcli.store.encoding_error import Measured
from kdcli.store.journal import store_digest
from kdcli.store.manifest import Manifest, read_manifest, write_manifest
from kdcli.structures import Canvas
from tests.support.hostile_case import manifest_file, set_at
from tests.support.store_case import CANVAS, GRID, make_manifest, make_schema, make_store

SCHEMA = make_schema()
MANIFEST = make_manifest(SCHEMA)
DOCUMENT = MANIFEST.to_json()
WRONG: dict[str, list[Any]] = {
    "teacher": [5, [], "gfl", None],
    "teacher.model": [5, "gfl", {}],
    "teacher.model.detector": [None, 5],
    "teacher.weights_sha256": [None, 5],
    "teacher.ap": ["40", float("nan"), True],
    "teacher.specs": [[], None],
    "teacher.specs.features": [5, {}, {"per": "cell", "dims": [2**40]}, {"per": 5, "dims": [1]}, {"per": "cell", "dims": [0]}],
    "teacher_run": [5, None, {}],
    "teacher_run.precision": [None, 16],
    "teacher_run.micro_batch": ["8", None, True, 1.5],
    "teacher_run.threads": ["1", True, -1],
    "teacher_run.compile": ["yes", 1],
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
    "dataset": [5, {}],
    "dataset.left_out": [5, ["1"]],
    "dataset.categories": [5, [5], [["1", "a"]], [[1, "a", 2]]],
    "dataset.num_images": ["7", True],
    "dataset.split": [None, 5],
    "canvas": ["64x32", None, 64],
    "view_seed": [None, "0", True],
    "versions": [{"zarr": 3}, None],
    "methods": [None, ["rm"], "rm,/home/me/mine.py:Mine", "rm,../mine.py:Mine", "a b", "pfi", "rm,rm", "rm,:Mine"],
    "method_needs": [None, [], {}, {"rm": "rank@main"}, {"rm": ["rank"]}, {"ld": ["rank@main"]}],
    "method_options": [None, [], {"rm": 5}],
    "origin": [None, {}, {"data": 5, "teacher": ""}],
    "errors": [None, {"encoding": {}}],
}  # fmt: skip


def without(document: dict[str, Any], path: str) -> dict[str, Any]:
    """A copy of ``document`` without the field ``a.b``."""
    changed = copy.deepcopy(document)
    *parents, last = path.split(".")
    table = changed
    for name in parents:
        table = table[name]
    del table[last]
    return changed


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in WRONG.items() for value in values])
def test_a_field_of_another_kind_is_refused(path: str, value: Any) -> None:
    document = {**DOCUMENT, "errors": {"encoding": {}, "precision": {}}}
    with pytest.raises(ValueError, match=r"^impossible "):
        Manifest.from_json(set_at(document, path, value))


@pytest.mark.parametrize("name", sorted(DOCUMENT.keys() - {"format", "version"}))
def test_a_field_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^impossible (or no )?{name}"):
        Manifest.from_json(without(DOCUMENT, name))


@pytest.mark.parametrize(
    ("path", "named"),
    [("wrote", "wrote"), ("teacher_run.speed", r"teacher_run\.speed"), ("schema.tensors.0.colour", r"schema\.tensors")],
)
def test_a_field_of_a_newer_kdcli_is_refused(path: str, named: str) -> None:
    """It would be lost when the manifest is written again, and may change what the numbers mean."""
    with pytest.raises(ValueError, match=f"^impossible {named}$"):
        Manifest.from_json(set_at(DOCUMENT, path, "a test"))


@pytest.mark.parametrize(
    "document",
    [
        DOCUMENT,
        set_at(DOCUMENT, "regions.vlr_alpha", 0.5),
        set_at(DOCUMENT, "regions.vlr_gamma", 1),  # a whole number is a float too
        set_at(DOCUMENT, "teacher.ap", 40.5),
        set_at(DOCUMENT, "teacher_run.compile", True),
        {
            **DOCUMENT, "methods": "rm,:Mine", "method_options": {"rm": {}, "mine": {"a": 1}},
            "method_needs": {"rm": ["rank@main"], "mine": []},
        },
        {**without(DOCUMENT, "method_needs"), "version": 1, "methods": "ld,/home/me/mine.py:Mine"},
        {**DOCUMENT, "errors": {"encoding": {"rank@main": {"rms": 1e-05, "relative": 0.25, "worst": 0.5}}, "precision": {}}},
        *(without(DOCUMENT, path) for path in ("teacher_run.compile", "regions.keep", "assigner.center_radius")),  # older
    ],
)  # fmt: skip
def test_what_is_read_is_written_back(document: dict[str, Any]) -> None:
    again = Manifest.from_json(document).to_json()
    assert again == document
    assert list(again) == list(document)


def test_reading_an_older_store_does_not_change_it(tmp_path: Path) -> None:
    """Of format version 1; in a later one the journal names what the manifest has to say."""
    schema = replace(SCHEMA, version=1)
    make_store(tmp_path / "s", schema)
    older = {**without(DOCUMENT, "method_needs"), "version": 1}
    older = without(without(older, "teacher_run.compile"), "regions.keep")
    (tmp_path / "s" / "zarr.json").write_bytes(manifest_file(older))
    before = store_digest(tmp_path / "s")
    manifest = read_manifest(tmp_path / "s")
    assert manifest.region_spec == RegionSpec()
    write_manifest(tmp_path / "s", replace(manifest, errors=Measured()))
    assert store_digest(tmp_path / "s") == before
    written = read_manifest(tmp_path / "s").to_json()
    assert written == {**older, "errors": {"encoding": {}, "precision": {}}}
    # and it is the store that this kdcli would go on with
    assert manifest.differences(MANIFEST) == []
    assert MANIFEST.differences(manifest) == []


def test_the_document_with_a_wrong_field_is_refused_as_a_store(tmp_path: Path) -> None:
    make_store(tmp_path / "s", SCHEMA)
    (tmp_path / "s" / "zarr.json").write_bytes(manifest_file({**DOCUMENT, "view_seed": "0"}))
    with pytest.raises(StoreError, match=r"its manifest has impossible or no view_seed; write the store again"):
        read_manifest(tmp_path / "s")


def test_differences_are_named_with_both_values() -> None:
    run = replace(MANIFEST.teacher_run, precision="bf16", compile=True)
    teacher = replace(MANIFEST.teacher, ap=50.0)  # measured by who makes the store
    ours = replace(
        MANIFEST, teacher=teacher, teacher_run=run, views=("identity",), methods=("ld",), versions={"zarr": "0"}
    )
    assert MANIFEST.differences(ours) == [
        "teacher_run.precision: store fp32, here bf16",
        "teacher_run.compile: store None, here True",
        "views: store ['identity', 'hflip'], here ['identity']",
    ]
    assert MANIFEST.differences(ours, ignoring=("teacher_run", "views")) == []
    lossless = replace(MANIFEST, schema=make_schema("lossless"))
    (tensors,) = (d for d in MANIFEST.differences(lossless) if d.startswith("schema.tensors: "))
    assert "here box_distribution@main+vlr float32" in tensors
    assert MANIFEST.differences(lossless, ignoring=("schema",)) == []


def test_a_model_option_that_came_later_is_no_difference() -> None:
    model = {**MANIFEST.teacher.model, "new": 1}
    later = replace(MANIFEST, teacher=replace(MANIFEST.teacher, model=model))
    assert MANIFEST.differences(later) == later.differences(MANIFEST) == []
    other = replace(MANIFEST, teacher=replace(MANIFEST.teacher, model={**model, "detector": "atss"}))
    assert later.differences(other) == ["teacher.model.detector: store gfl, here atss"]


def test_what_may_be_merged() -> None:
    schema = replace(SCHEMA, rows=2, shard_rows=1, max_boxes=9)
    dataset = replace(MANIFEST.dataset, annotations_sha256="2", num_images=1, left_out=(5,))
    other = replace(MANIFEST, views=("identity",), dataset=dataset, schema=schema)
    assert MANIFEST.merge_differences(other) == []
    classes = replace(other, dataset=replace(dataset, categories=((1, "b"),)))
    assert MANIFEST.merge_differences(classes) == ["dataset.categories: store [[1, 'a']], here [[1, 'b']]"]
    able = replace(other, teacher=replace(MANIFEST.teacher, ap=50.0))
    assert MANIFEST.merge_differences(able) == ["teacher.ap: store None, here 50.0"]


def test_a_run_is_compared_in_what_it_reads_by() -> None:
    data = MANIFEST.dataset.fingerprint()
    assert MANIFEST.run_differences(data) == MANIFEST.run_differences(data, CANVAS) == []
    same = (GRID, MANIFEST.assigner_spec, MANIFEST.region_spec)
    assert MANIFEST.run_differences(data, CANVAS, same) == []
    other = (Grid(scales=(1.0, 2.0)), MANIFEST.assigner_spec, RegionSpec(vlr_gamma=0.5))
    assert MANIFEST.run_differences({**data, "num_images": 1}, Canvas(64, 64), other) == [
        "dataset.num_images: store 7, here 1",
        "canvas: store 32x64, here 64",
        "schema.grid.scales: store [1.0], here [1.0, 2.0]",
        "regions.vlr_gamma: store 0.25, here 0.5",
    ]
