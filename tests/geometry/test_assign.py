"""Assigners against plain loops, and the corner cases that the reference numbers do not have."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcli.errors import OptionError
from kdcli.geometry import assign as assign_module
from kdcli.geometry.assign import AssignerSpec, assign, closest_anchors, follows_from_positives, from_positives
from kdcli.geometry.boxes import pairwise_iou
from kdcli.geometry.grid import Grid
from kdcli.structures import BACKGROUND, IGNORED, Canvas

ATSS, MAX_IOU = AssignerSpec("atss"), AssignerSpec("max_iou")
FCOS, CENTERED = AssignerSpec("fcos"), AssignerSpec("fcos", center_radius=1.5)
POINTS = Grid(offset=0.5)
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


@pytest.mark.parametrize("grid", [Grid(), RETINA, POINTS, Grid(stride_rule="image_over_grid")])
@pytest.mark.parametrize("topk", [1, 9, 12])
def test_closest_anchors_are_those_of_a_full_sort(grid: Grid, topk: int) -> None:
    boxes = random_boxes(12, seed=topk)
    index, real = closest_anchors(grid, CANVAS, boxes.double().numpy(), CONTENT, topk)
    ours = [row[keep].tolist() for row, keep in zip(index, real, strict=True)]
    assert ours == plain_closest(grid, boxes, topk)


@pytest.mark.parametrize("grid", [Grid(), RETINA, POINTS, Grid(strides=(12, 40)), Grid(stride_rule="image_over_grid")])
@pytest.mark.parametrize("content", [(256, 320), (250, 130), (129, 320), (128, 320), (33, 320)])
@pytest.mark.parametrize("topk", [1, 3, 4, 9, 12, 30])
def test_a_small_window_holds_the_closest_anchors(
    grid: Grid, content: tuple[int, int], topk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    canvas, (height, width) = Canvas(256, 320), content
    corners = torch.tensor([[x, y, x + 2, y + 2] for x in (0, width - 2) for y in (0, height - 2)])
    boxes = torch.cat([corners, random_boxes(60, topk, content)]).double().numpy()
    index, real = closest_anchors(grid, canvas, boxes, content, topk)
    cells = -(-topk // grid.num_anchors)
    monkeypatch.setattr(assign_module, "_reach", lambda *_: cells - 1)  # as far as a single row of cells needs
    wide_index, wide_real = closest_anchors(grid, canvas, boxes, content, topk)
    assert np.array_equal(index, wide_index)
    assert np.array_equal(real, wide_real)


def test_the_window_is_small_where_no_level_is_one_row() -> None:
    canvas = Canvas(256, 320)
    reach = [
        assign_module._reach(grid, grid.valid_shapes(canvas, content), cells)
        for grid, content, cells in (
            (Grid(), (256, 320), 9), (Grid(), (256, 320), 2), (Grid(), (128, 320), 9),
            (Grid(stride_rule="image_over_grid"), (256, 320), 9),
        )
    ]  # fmt: skip
    assert reach == [4, 1, 8, 8]


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


def plain_fcos(spec: AssignerSpec, boxes: Tensor) -> list[int]:
    """FCOS point by point."""
    edges = [-1.0, *spec.ranges, float("inf")]
    levels = [k for k, n in enumerate(POINTS.level_sizes(CANVAS)) for _ in range(n)]
    owner = []
    for (x, y), level in zip(POINTS.centers(CANVAS).tolist(), levels, strict=True):
        found = []
        for g, (x1, y1, x2, y2) in enumerate(boxes.double().tolist()):
            reach = spec.center_radius * POINTS.strides[level]
            near = not reach or max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < reach
            inside = min(x - x1, y - y1, x2 - x, y2 - y) > 0
            if inside and near and edges[level] <= max(x - x1, y - y1, x2 - x, y2 - y) <= edges[level + 1]:
                found.append(((x2 - x1) * (y2 - y1), g))
        owner.append(min(found)[1] if found else BACKGROUND)
    return owner


@pytest.mark.parametrize("spec", [FCOS, CENTERED, AssignerSpec("fcos", ranges=(16, 24, 40, 80), center_radius=0.7)])
@pytest.mark.parametrize("chunk", [1, 4_000_000])
def test_fcos_is_the_plain_loop(spec: AssignerSpec, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assign_module, "CHUNK", chunk)
    boxes = random_boxes(14, seed=2)
    ours = assign(spec, POINTS, CANVAS, boxes, CONTENT)
    assert ours.dtype == torch.int32
    assert ours.tolist() == plain_fcos(spec, boxes)
    assert len(set(ours.tolist())) > 5


def test_fcos_ranges_hold_both_ends() -> None:
    # the farthest edge of the point at (68, 68) is 64 px away, the end of the first and the start of the second range;
    # a level's points lie at 4 + 8k and at 8 + 16k, so only the finest has one at 68
    box = torch.tensor([[4.0, 4.0, 132.0, 132.0]])
    canvas = Canvas(160, 160)
    fine = assign(FCOS, POINTS, canvas, box, canvas.size)[:400].reshape(20, 20)
    assert torch.nonzero(fine >= 0).tolist() == [[8, 8]]
    # and that at (72, 72) of the second level, for a box that reaches 64 px from it
    box = torch.tensor([[8.0, 8.0, 136.0, 136.0]])
    coarse = assign(FCOS, POINTS, canvas, box, canvas.size)[400:500].reshape(10, 10)
    assert coarse[4, 4] == 0


def test_fcos_gives_a_point_the_smallest_box_and_the_first_of_equals() -> None:
    canvas = Canvas(96, 96)
    boxes = torch.tensor([[0.0, 0, 60, 60], [10, 10, 50, 50], [50, 10, 10 + 80, 50], [10, 10, 50, 50]])
    ours = assign(FCOS, POINTS, canvas, boxes, canvas.size)[:144].reshape(12, 12)
    assert ours[3, 3] == 1  # (28, 28): in boxes 0, 1 and 3
    assert ours[0, 0] == 0
    assert ours[3, 9] == 2
    assert 3 not in ours.tolist()


def test_fcos_trains_on_the_padding() -> None:
    ours = assign(FCOS, POINTS, CANVAS, random_boxes(5, seed=1), CONTENT)
    valid = POINTS.valid(CANVAS, CONTENT)
    assert (~valid).any()
    assert (ours[~valid] == BACKGROUND).all()
    assert IGNORED not in ours.tolist()


@pytest.mark.parametrize(("spec", "grid"), [(ATSS, Grid()), (MAX_IOU, RETINA), (FCOS, POINTS), (CENTERED, POINTS)])
@pytest.mark.parametrize("canvas", [Canvas(32, 32), Canvas(32, 96), Canvas(608, 800)])
def test_tiny_and_large_canvases_and_300_boxes(spec: AssignerSpec, grid: Grid, canvas: Canvas) -> None:
    content = (canvas.height - 3, canvas.width - 9)
    boxes = random_boxes(300, seed=3, content=content)
    ours = assign(spec, grid, canvas, boxes, content)
    assert ours.shape == (grid.num_total(canvas),)
    assert int(ours.max()) < 300
    assert int(ours.min()) >= IGNORED
    assert (ours >= 0).any() or canvas == Canvas(32, 32)
    x, y = grid.centers(canvas).repeat_interleave(grid.num_anchors, dim=0)[ours >= 0].T
    owner = boxes.double()[ours[ours >= 0].long()].T
    if spec.kind == "fcos":
        assert ((x > owner[0]) & (x < owner[2]) & (y > owner[1]) & (y < owner[3])).all()


def test_an_image_without_boxes_is_background_for_fcos() -> None:
    assert (assign(CENTERED, POINTS, CANVAS, torch.zeros(0, 4), CONTENT) == BACKGROUND).all()


@pytest.mark.parametrize(("spec", "grid"), [(ATSS, Grid()), (MAX_IOU, RETINA)])
def test_an_image_without_boxes_is_background(spec: AssignerSpec, grid: Grid) -> None:
    ours = assign(spec, grid, CANVAS, torch.zeros(0, 4), CONTENT)
    valid = grid.valid_anchors(CANVAS, CONTENT)
    assert (ours[valid] == BACKGROUND).all()
    assert (ours[~valid] == IGNORED).all()
    assert (~valid).any()


@pytest.mark.parametrize(("spec", "grid"), [(ATSS, Grid()), (MAX_IOU, RETINA), (FCOS, POINTS)])
def test_assignment_ignores_the_order_of_boxes(spec: AssignerSpec, grid: Grid) -> None:
    boxes = torch.tensor([[10.3, 10.1, 61.7, 52.9], [90.2, 31.4, 180.5, 94.8], [20.9, 60.2, 47.3, 88.8]])
    forward = assign(spec, grid, CANVAS, boxes, CONTENT)
    backward = assign(spec, grid, CANVAS, boxes.flip(0), CONTENT)
    assert torch.equal(torch.where(forward >= 0, 2 - forward, forward), backward)
    assert set(range(3)) <= set(forward.tolist())


@pytest.mark.parametrize("spec", [ATSS, MAX_IOU, AssignerSpec("max_iou", pos_iou=0.7, neg_iou=0.3), CENTERED])
def test_json_round_trip(spec: AssignerSpec) -> None:
    assert AssignerSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kind": "atts"}, "did you mean 'atss'"),
        ({"kind": "atss", "topk": 0}, "topk"),
        ({"kind": "max_iou", "neg_iou": 0.6}, "neg_iou"),
        ({"kind": "fcos", "ranges": (64.0, 32.0)}, "ranges must"),
        ({"kind": "fcos", "center_radius": -1.0}, "center_radius must"),
    ],
)
def test_impossible_specs_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        AssignerSpec(**bad)


@pytest.mark.parametrize(
    ("spec", "grid"),
    [(ATSS, Grid()), (ATSS, RETINA), (FCOS, POINTS), (CENTERED, POINTS), (AssignerSpec("none"), Grid())],
)
@pytest.mark.parametrize("count", [0, 1, 12])
def test_an_assignment_follows_from_its_positives(spec: AssignerSpec, grid: Grid, count: int) -> None:
    assert follows_from_positives(spec)
    found = 0
    for content in (CONTENT, (160, 224), (7, 33)):
        assigned = assign(spec, grid, CANVAS, random_boxes(count, count, content), content)
        index = torch.nonzero(assigned >= 0).squeeze(1)
        again = from_positives(spec, grid, CANVAS, content, index, assigned[index].long())
        assert again.dtype == assigned.dtype
        assert torch.equal(again, assigned)
        found += len(index)
    assert found or count == 0 or spec.kind == "none"


def test_ignored_anchors_inside_the_content_do_not_follow() -> None:
    assigned = assign(MAX_IOU, RETINA, CANVAS, random_boxes(12, 12), CONTENT)
    assert ((assigned == IGNORED) & RETINA.valid_anchors(CANVAS, CONTENT)).any()
    assert not follows_from_positives(MAX_IOU)
