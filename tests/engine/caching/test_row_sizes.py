"""Prices: what the schema allocates for dense tensors, and what the typical image fills of sparse ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.detectors.base import Detector
from kdcli.detectors.build import ModelSpec, build_detector
from kdcli.engine.caching.row_sizes import TYPICAL_BOXES, missing, row_bytes, specs_at, typical_boxes
from kdcli.geometry.assign import assign
from kdcli.geometry.regions import RegionSpec, compute_entries
from kdcli.methods import METHODS
from kdcli.methods.resolve import resolve_options
from kdcli.store.encoding_policy import derived_from_dense, plan_tensors
from kdcli.store.schema import MAX_PROPOSALS, StoreSchema, regions_of
from kdcli.structures import Canvas
from kdcli.tensors import Need

COCO = Canvas(800, 1344)
CELLS = 22_400  # P3..P7 at 800x1344
ENTRY = 4 + 1 + 2 + 4  # index, flag, gt, weight
FIXED = 64 + 11 * 8  # row/identity, row/geometry


def small(name: str) -> Detector:
    return build_detector(ModelSpec(name, "shufflenet_v2_x0_5", 2, 32, 1, head_channels=32))


def test_the_typical_image_has_seven_boxes_on_the_canvas() -> None:
    boxes = typical_boxes(Canvas(320, 640))
    assert boxes.shape == (len(TYPICAL_BOXES), 4) == (7, 4)
    assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
    assert (boxes >= 0).all()
    assert boxes[:, 0::2].max() <= 640
    assert boxes[:, 1::2].max() <= 320


def test_dense_tensors_cost_what_is_allocated() -> None:
    model = small("gfl")
    specs = specs_at(model, 80)
    found = row_bytes(model, specs, METHODS["pfi"].needs, model.region_defaults, COCO)
    assert found["tensors/features@all/values"] == CELLS * 256
    assert found["tensors/features@all/affine"] == 5 * 2 * 256 * 4
    assert found["tensors/cls_logits@all/values"] == CELLS * 80
    assert sum(found.values()) == CELLS * 336 + 5 * 2 * 256 * 4 + FIXED
    boxes = row_bytes(model, specs, [Need("boxes", "all")], model.region_defaults, COCO)
    assert boxes["tensors/boxes@all/values"] == CELLS * 4 * 2


def test_sparse_tensors_cost_their_entries() -> None:
    model = small("gfl")
    found = row_bytes(model, specs_at(model, 80), METHODS["ld"].needs, model.region_defaults, COCO)
    boxes = typical_boxes(COCO)
    entries = compute_entries(
        frozenset({"main", "vlr"}), RegionSpec(), model.grid, COCO, boxes,
        assign(model.assigner, model.grid, COCO, boxes, COCO.size), COCO.size,
    )  # fmt: skip
    union, main = len(entries.index), int(entries.select("main").sum())
    assert (main, union) == (69, 911)  # 58 and 834 on average in 92 images of COCO
    assert found["entries/count"] == 4
    assert sum(v for path, v in found.items() if path.startswith("entries/")) == 4 + union * ENTRY
    assert found["tensors/box_distribution@main+vlr/values"] == union * 4 * 17
    assert found["tensors/box_distribution@main+vlr/affine"] == union * 4 * 2 * 2
    assert found["tensors/cls_logits@main/values"] == main * 80 * 2


def test_boxes_and_proposals_cost_their_counts() -> None:
    model = small("faster_rcnn")
    specs = specs_at(model, 80)
    rois = row_bytes(model, specs, METHODS["drkd_lite"].needs, model.region_defaults, COCO)
    assert rois["tensors/gt_rois@gt/values"] == 7 * 2 * 256 * 9 * 2
    assert rois["boxes/count"] == 4
    options = resolve_options("defeat", METHODS["defeat"], "faster_rcnn", {"obj_cls_weight": 2.0})
    found = row_bytes(model, specs, METHODS["defeat"].reads(options), model.region_defaults, COCO)
    assert found["tensors/proposals/logits@proposals/values"] == (MAX_PROPOSALS + 7) * 81 * 2
    assert found["tensors/proposals/boxes@proposals/values"] == (MAX_PROPOSALS + 7) * 4 * 4


def test_a_row_that_is_written_has_these_bytes() -> None:
    """The arrays that an encoded row of the typical image really has."""
    model, canvas = small("gfl"), Canvas(128, 192)
    specs = specs_at(model, 3, channels=8)
    needs = sorted({*METHODS["ld"].needs, *METHODS["defeat_thin"].needs, *METHODS["pfi"].needs})
    boxes = typical_boxes(canvas)
    entries = compute_entries(
        regions_of(needs), model.region_defaults, model.grid, canvas, boxes,
        assign(model.assigner, model.grid, canvas, boxes, canvas.size), canvas.size,
    )  # fmt: skip
    derived = derived_from_dense(needs)
    assert derived  # defeat_thin's features: PFI's hold them
    stored = [n for n in needs if n not in derived]
    schema = StoreSchema(
        grid=model.grid,
        canvas=canvas,
        rows=1,
        shard_rows=1,
        tensors=plan_tensors(stored, specs),
        derived_from_dense=derived,
    )
    cells = model.grid.num_cells(canvas)
    values = {
        t.need.key: np.ones((cells if t.need.dense else int(entries.select(t.need.region).sum()), *t.dims), np.float32)
        for t in schema.tensors
    }
    priced = row_bytes(model, specs, needs, model.region_defaults, canvas)
    for path, array in schema.encode(values, np.ones(cells, bool)).items():
        assert priced[path] == array.nbytes, path


@pytest.mark.parametrize(("detector", "method", "lacking"), [
    ("gfl", "ld", []),
    ("atss", "ld", ["box_distribution"]),
    ("faster_rcnn", "rm", ["cls_logits"]),
    ("faster_rcnn", "drkd_lite", []),
])  # fmt: skip
def test_missing_tensors_are_named(detector: str, method: str, lacking: list[str]) -> None:
    options = resolve_options(method, METHODS[method], detector, {})
    assert missing(METHODS[method].reads(options), small(detector).specs()) == lacking


def test_prices_leave_the_random_numbers_alone() -> None:
    model = small("gfl")
    before = torch.random.get_rng_state()
    row_bytes(model, specs_at(model, 2), METHODS["defeat_thin"].needs, model.region_defaults, Canvas(64, 64))
    assert torch.equal(before, torch.random.get_rng_state())
