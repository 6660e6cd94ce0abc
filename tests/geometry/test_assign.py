"""Assigners against plain loops, and the corner cases that the reference numbers do not have."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.errors import OptionError
from kdcli.geometry import assign as assign_module
from kdcli.geometry.assign import AssignerSpec, assign, closest_anchors
from kdcli.geometry.boxes import pairwise_iou
from kdcli.geometry.grid import Grid
from kdcli.structures import BACKGROUND, IGNORED, Canvas

ATSS, MAX_IOU = AssignerSpec("atss"), AssignerSpec("max_iou")
RETINA = Grid(base_scale=4.0, scales=(1.0, 2 ** (1 / 3), 2 ** (2 / 3)), ratios=(0.5, 1.0, 2.0))
CANVAS, CONTENT = Canvas(160, 224), (100, 200)


def random_boxes(count: int, seed: int, content: tuple[int, int] = CONTENT) -> Tensor:
    """Boxes inside the content; every second one on whole pixels, where distances tie."""
    generator = torch.Generator().manual_seed(seed)
    limit = torch.tensor([content[1], content[0]])
    a, b = torch.rand(2, count, 2, generator=generator).mul(limit)
    low, high = torch.minimum(a, b), torch.maximum(torch.maximum(a, b), torch.minimum(a, b) + 4).minimum(limit)
    boxes = torch.cat([low.minimum(high - 2), high], dim=1)
    boxes[::2] = boxes[::2].round()
    return boxes


def plain_closest(grid: Grid, boxes: Tensor, topk: int) -> list[list[int]]:
    """For each box the closest valid anchors of each level, by sorting all of them."""
    anchors, valid = grid.anchors(CANVAS), grid.valid_anchors(CANVAS, CONTENT)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2 if grid.num_anchors == 1 else None
    if centers is None:
        centers = grid.centers(CANVAS).repeat_interleave(grid.num_anchors, dim=0)
    found = []
    for box in boxes.double():
        distance = (centers - (box[:2] + box[2:]) / 2).square().sum(dim=1)
        picked, start = [], 0
        for size in grid.level_sizes(CANVAS):
            level = [i for i in range(start, start + size) if valid[i]]
            picked += sorted(level, key=lambda i: (float(distance[i]), i))[:topk]
            start += size
        found.append(picked)
    return found


def plain_atss(grid: Grid, boxes: Tensor, topk: int) -> list[int]:
    """ATSS box by box."""
    anchors, centers = grid.anchors(CANVAS), grid.centers(CANVAS).repeat_interleave(grid.num_anchors, dim=0)
    iou = pairwise_iou(boxes.double(), anchors)
    owner, best = [BACKGROUND] * len(anchors), [-1.0] * len(anchors)
    for g, candidates in enumerate(plain_closest(grid, boxes, topk)):
        values = iou[g, candidates]
        threshold = values.mean() + values.std()
        x1, y1, x2, y2 = boxes[g].double().tolist()
        for i, value in zip(candidates, values, strict=True):
            x, y = centers[i].tolist()
            inside = min(x - x1, y - y1, x2 - x, y2 - y) > 0.01
            if value >= threshold and inside and value > best[i]:
                owner[i], best[i] = g, float(value)
    return [o if v else IGNORED for o, v in zip(owner, grid.valid_anchors(CANVAS, CONTENT), strict=True)]


@pytest.mark.parametrize("grid", [Grid(), RETINA, Grid(offset=0.5)])
@pytest.mark.parametrize("topk", [1, 9, 12])
def test_closest_anchors_are_those_of_a_full_sort(grid: Grid, topk: int) -> None:
    boxes = random_boxes(12, seed=topk)
    index, real = closest_anchors(grid, CANVAS, boxes.double(), CONTENT, topk)
    ours = [row[keep].tolist() for row, keep in zip(index, real, strict=True)]
    assert ours == plain_closest(grid, boxes, topk)


@pytest.mark.parametrize("grid", [Grid(), RETINA])
@pytest.mark.parametrize("seed", range(4))
def test_atss_is_the_plain_loop(grid: Grid, seed: int) -> None:
    boxes = random_boxes(9, seed)
    ours = assign(ATSS, grid, CANVAS, boxes, CONTENT)
    assert ours.dtype == torch.int32
    assert ours.tolist() == plain_atss(grid, boxes, 9)
    assert (ours >= 0).any()


def plain_max_iou(boxes: Tensor) -> list[int]:
    """Thresholds, then each box takes its best anchor, the lowest index of those within 1e-6."""
    valid = RETINA.valid_anchors(CANVAS, CONTENT)
    iou = pairwise_iou(boxes.double(), RETINA.anchors(CANVAS)) * valid
    owner = []
    for column in iou.T:
        top = float(column.max())
        owner.append(int(column.argmax()) if top >= 0.5 else BACKGROUND if top < 0.4 else IGNORED)
    for g, row in enumerate(iou):
        tied = [i for i in range(len(row)) if valid[i] and row[i] >= row.max() - 1e-6]
        owner[tied[0]] = g
    return [o if v else IGNORED for o, v in zip(owner, valid, strict=True)]


@pytest.mark.parametrize("chunk", [1, 4_000_000])
@pytest.mark.parametrize("seed", range(3))
def test_max_iou_is_the_plain_loop(seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assign_module, "CHUNK", chunk)
    boxes = random_boxes(9, seed)
    ours = assign(MAX_IOU, RETINA, CANVAS, boxes, CONTENT)
    assert ours.tolist() == plain_max_iou(boxes)
    assert {BACKGROUND, IGNORED} < set(ours.tolist())


def test_max_iou_gives_a_tiny_box_the_first_of_equal_anchors() -> None:
    box = torch.tensor([[100.0, 60.0, 103.0, 63.0]])  # inside many anchors, all of the same IoU
    ours = assign(MAX_IOU, RETINA, CANVAS, box, CONTENT)
    iou = pairwise_iou(box.double(), RETINA.anchors(CANVAS))[0]
    tied = torch.nonzero(iou >= iou.max() - 1e-6)[:, 0]
    assert len(tied) > 1
    assert torch.nonzero(ours >= 0)[:, 0].tolist() == tied[:1].tolist()


@pytest.mark.parametrize(("spec", "grid"), [(ATSS, Grid()), (MAX_IOU, RETINA)])
def test_an_image_without_boxes_is_background(spec: AssignerSpec, grid: Grid) -> None:
    ours = assign(spec, grid, CANVAS, torch.zeros(0, 4), CONTENT)
    valid = grid.valid_anchors(CANVAS, CONTENT)
    assert (ours[valid] == BACKGROUND).all()
    assert (ours[~valid] == IGNORED).all()
    assert (~valid).any()


@pytest.mark.parametrize(("spec", "grid"), [(ATSS, Grid()), (MAX_IOU, RETINA)])
def test_assignment_ignores_the_order_of_boxes(spec: AssignerSpec, grid: Grid) -> None:
    boxes = torch.tensor([[10.3, 10.1, 61.7, 52.9], [90.2, 31.4, 180.5, 94.8], [20.9, 60.2, 47.3, 88.8]])
    forward = assign(spec, grid, CANVAS, boxes, CONTENT)
    backward = assign(spec, grid, CANVAS, boxes.flip(0), CONTENT)
    assert torch.equal(torch.where(forward >= 0, 2 - forward, forward), backward)
    assert set(range(3)) <= set(forward.tolist())


@pytest.mark.parametrize("spec", [ATSS, MAX_IOU, AssignerSpec("max_iou", pos_iou=0.7, neg_iou=0.3)])
def test_json_round_trip(spec: AssignerSpec) -> None:
    assert AssignerSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kind": "atts"}, "did you mean 'atss'"),
        ({"kind": "atss", "topk": 0}, "topk"),
        ({"kind": "max_iou", "neg_iou": 0.6}, "neg_iou"),
    ],
)
def test_impossible_specs_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        AssignerSpec(**bad)
