"""Regions: published counts, sorting and flags, empty images, the guard."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torchvision import ops

from kdcli.errors import OptionError
from kdcli.geometry import regions as regions_module
from kdcli.geometry.assign import AssignerSpec, assign, atss_candidates
from kdcli.geometry.boxes import pairwise_iou
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec, compute_entries, guard, vlr_metric, vlr_weights
from kdcli.structures import MAIN, VLR, Canvas, Entries

CANVAS, CONTENT = Canvas(256, 256), (256, 256)
BOXES = torch.tensor([[40.0, 48.0, 120.0, 144.0], [100.0, 60.0, 230.0, 200.0]])
BOTH = frozenset({"main", "vlr"})
RETINA = Grid(base_scale=4.0, scales=(1.0, 2 ** (1 / 3), 2 ** (2 / 3)), ratios=(0.5, 1.0, 2.0))


def entries_of(count: int, spec: RegionSpec, regions: frozenset[str] = BOTH) -> Entries:
    boxes, grid = BOXES[:count], Grid()
    assigned = assign(AssignerSpec("atss"), grid, CANVAS, boxes, CONTENT)
    return compute_entries(regions, spec, grid, CANVAS, boxes, assigned, CONTENT)


@pytest.mark.parametrize(
    ("boxes", "metric", "by_level", "weight", "overlap"),
    [
        (1, "diou", [82, 45], 41.146347, 0),
        (1, "official", [98, 61], 34.173916, 0),
        (2, "diou", [195, 121], 91.18127, 0),
        (2, "official", [259, 146], 69.72942, 3),
    ],
)
def test_known_regions(boxes: int, metric: str, by_level: list[int], weight: float, overlap: int) -> None:
    # counts, weights and thresholds that two independent implementations of the paper and of LD's code gave
    entries = entries_of(boxes, RegionSpec(vlr_metric=metric))  # type: ignore[arg-type]
    vlr = entries.index[entries.select("vlr")]
    assert [int((vlr < 1024).sum()), int((vlr >= 1024).sum())] == by_level
    assert float(entries.weight.double().sum()) == pytest.approx(weight, abs=1e-5)
    assert int((entries.flag == MAIN | VLR).sum()) == overlap


def test_known_positives_and_thresholds() -> None:
    positives = [361, 362, 363, 393, 394, 395, 425, 426, 427]
    entries = entries_of(1, RegionSpec(), frozenset({"main"}))
    assert entries.index.tolist() == positives
    assert entries.gt.tolist() == [0] * 9
    assert not entries.weight.any()
    assert int(entries_of(2, RegionSpec()).select("main").sum()) == 18
    alpha = atss_candidates(Grid(), CANVAS, BOXES.double(), CONTENT, 9).threshold
    assert alpha.tolist() == pytest.approx([0.4846235, 0.5336807], abs=1e-7)


def test_entries_are_sorted_unique_and_say_what_they_are() -> None:
    entries = entries_of(2, RegionSpec(vlr_metric="official"))
    assert (entries.index.diff() > 0).all()
    main, vlr = entries.select("main"), entries.select("vlr")
    assert (main | vlr).all()
    assert (main & vlr).any()
    assert torch.equal(main, entries.gt >= 0)
    assert torch.equal(vlr, entries.weight > 0)
    dtypes = [t.dtype for t in (entries.index, entries.flag, entries.gt, entries.weight, entries.image)]
    assert dtypes == [torch.int64, torch.uint8, torch.int64, torch.float32, torch.int64]


def test_diou_agrees_with_torchvision() -> None:
    anchors = Grid().anchors(CANVAS)
    value, iou = vlr_metric("diou", BOXES.double().numpy().T[..., None], Grid().anchor_columns(CANVAS).numpy()[:, None])
    torch.testing.assert_close(torch.from_numpy(iou), ops.box_iou(BOXES.double(), anchors))
    torch.testing.assert_close(
        torch.from_numpy(value), ops.distance_box_iou(BOXES.double(), anchors), rtol=1e-9, atol=1e-9
    )


def test_official_diou_is_the_covered_share_of_the_anchor() -> None:
    box, anchor = np.array([0.0, 0.0, 10.0, 10.0]), np.array([5.0, 0.0, 9.0, 10.0])
    # all of the anchor is covered; centres 2 px apart; the hull is the box
    assert vlr_metric("official", box, anchor) == (pytest.approx(1 - 4 / 200), 0.4)
    assert vlr_metric("diou", box, anchor) == (pytest.approx(0.4 - 4 / 200), 0.4)


@pytest.mark.parametrize("metric", ["diou", "official"])
@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
def test_the_region_is_that_of_all_pairs(metric: str, gamma: float) -> None:
    # only overlapping pairs are looked at; the third box has no width, the fourth lies in the padding
    boxes = torch.cat([BOXES, torch.tensor([[60.0, 60.0, 60.0, 90.0], [30.0, 170.0, 90.0, 250.0]])])
    content, grid = (160, 256), RETINA
    weights = vlr_weights(RegionSpec(vlr_metric=metric, vlr_gamma=gamma), grid, CANVAS, boxes, content)  # type: ignore[arg-type]
    anchors, alpha = grid.anchors(CANVAS), atss_candidates(grid, CANVAS, boxes.double(), content, 9).threshold
    value, _ = vlr_metric(metric, boxes.double().numpy().T[..., None], anchors.numpy().T[:, None])
    high = alpha[:, None]
    inside = torch.from_numpy((value < high) & (value >= gamma * high)) & grid.valid_anchors(CANVAS, content)
    plain = pairwise_iou(boxes.double(), anchors).masked_fill(~inside, 0).amax(dim=0)
    assert torch.equal(weights, plain)
    assert (weights > 0).any() == (gamma < 1)


def test_positives_leave_the_region_when_told() -> None:
    kept = entries_of(2, RegionSpec(vlr_metric="official"))
    removed = entries_of(2, RegionSpec(vlr_metric="official", vlr_keep_positives=False))
    assert not (removed.select("main") & removed.select("vlr")).any()
    assert int(kept.select("vlr").sum()) - int(removed.select("vlr").sum()) == 3
    assert torch.equal(kept.index, removed.index)


def test_fixed_alpha_is_a_threshold_of_the_metric() -> None:
    few = entries_of(1, RegionSpec(vlr_alpha=0.5, vlr_gamma=0.9)).select("vlr").sum()
    many = entries_of(1, RegionSpec(vlr_alpha=0.5, vlr_gamma=0.1)).select("vlr").sum()
    assert 0 < few < many


def test_only_valid_anchors_are_entries() -> None:
    canvas, content, grid = Canvas(256, 320), (100, 130), Grid()
    boxes = torch.tensor([[20.0, 10.0, 129.0, 99.0]])
    assigned = assign(AssignerSpec("atss"), grid, canvas, boxes, content)
    entries = compute_entries(BOTH, RegionSpec(), grid, canvas, boxes, assigned, content)
    assert len(entries.index)
    assert grid.valid_anchors(canvas, content)[entries.index].all()


@pytest.mark.parametrize("grid", [Grid(), RETINA])
def test_an_image_without_boxes_has_no_entries(grid: Grid) -> None:
    boxes = torch.zeros(0, 4)
    assigned = assign(AssignerSpec("max_iou"), grid, CANVAS, boxes, CONTENT)
    entries = compute_entries(BOTH, RegionSpec(), grid, CANVAS, boxes, assigned, CONTENT)
    assert [len(t) for t in (entries.index, entries.flag, entries.gt, entries.weight, entries.image)] == [0] * 5


def test_boxes_at_a_time_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = vlr_weights(RegionSpec(), RETINA, CANVAS, BOXES, CONTENT)
    monkeypatch.setattr(regions_module, "CHUNK", 1)
    assert torch.equal(vlr_weights(RegionSpec(), RETINA, CANVAS, BOXES, CONTENT), whole)
    assert (whole > 0).any()


def test_unknown_region_is_refused() -> None:
    with pytest.raises(OptionError, match="'all' is not sparse"):
        entries_of(1, RegionSpec(), frozenset({"main", "all"}))


def test_guard_sees_boxes_labels_and_definition() -> None:
    labels, definition = torch.tensor([3, 5]), json.dumps(RegionSpec().to_json())
    known = guard(BOXES, labels, definition)
    assert len(known) == 16
    assert known == guard(BOXES.clone(), labels.to(torch.int32), definition)
    moved = BOXES.clone()
    moved[0, 0] = torch.nextafter(moved[0, 0], torch.tensor(0.0))
    others = [
        guard(moved, labels, definition),
        guard(BOXES, labels.flip(0), definition),
        guard(BOXES, labels, json.dumps(RegionSpec(vlr_metric="official").to_json())),
        guard(BOXES[:1], labels[:1], definition),
        guard(BOXES[:0], labels[:0], definition),
    ]
    assert len({known, *others}) == 6


@pytest.mark.parametrize("spec", [RegionSpec(), RegionSpec("official", 0.5, 0.4, 7, False)])
def test_json_round_trip(spec: RegionSpec) -> None:
    assert RegionSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize("bad", [{"vlr_metric": "ciou"}, {"vlr_gamma": 1.5}, {"vlr_alpha": 0.0}, {"vlr_topk": 0}])
def test_impossible_specs_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        RegionSpec(**bad)  # type: ignore[arg-type]
