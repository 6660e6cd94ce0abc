"""FGD against loops over boxes, cells and channels, written from the paper."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdcli.methods.fgd import FGD, ContextBlock, attentions, focal_losses, foreground_mask, relation_loss
from kdcli.methods.resolve import resolve_options
from kdcli.structures import Canvas
from tests.support.feature_case import (
    CANVAS,
    GRID,
    NONE,
    ONE,
    TWO,
    check_common,
    grad,
    make_batch,
    make_pair,
    maps,
    number,
    run,
)

SHAPES = GRID.level_shapes(CANVAS)


def level_valid(level: int, batch_valid: Tensor) -> Tensor:
    return torch.split(batch_valid, [h * w for h, w in SHAPES], dim=1)[level]


def test_fgd_does_what_every_method_must() -> None:
    check_common(FGD)


def mask_by_loops(boxes: Tensor, valid: Tensor, level: int) -> Tensor:
    """The share of each cell of one image, box by box and cell by cell."""
    (rows, columns), stride = SHAPES[level], GRID.strides[level]
    mask = torch.zeros(rows, columns)
    for x1, y1, x2, y2 in boxes.tolist():
        left, right = math.floor(x1 / stride), math.ceil(x2 / stride)
        top, bottom = math.floor(y1 / stride), math.ceil(y2 / stride)
        share = 1 / ((right - left + 1) * (bottom - top + 1))
        for y in range(top, min(bottom, rows - 1) + 1):
            for x in range(left, min(right, columns - 1) + 1):
                mask[y, x] = max(number(mask[y, x]), share)
    return mask.flatten() * valid


@pytest.mark.parametrize("level", range(5))
def test_the_smallest_box_over_a_cell_gives_its_share(level: int) -> None:
    nested = torch.tensor([[0.0, 0.0, 128.0, 64.0], [10.0, 12.0, 60.0, 50.0], [40.0, 30.0, 47.0, 39.9]])
    batch = make_batch([nested, NONE, TWO])
    valid = level_valid(level, batch.targets.valid)
    found = foreground_mask(batch.targets.boxes, valid, GRID, CANVAS, level)
    for i, boxes in enumerate(batch.targets.boxes):
        torch.testing.assert_close(found[i], mask_by_loops(boxes, valid[i], level))


def test_attentions_by_loops() -> None:
    value, valid = maps(2, 3)[:, :5].double(), torch.tensor([[True] * 5, [True, False, True, True, False]])
    spatial, channel = attentions(value, valid, 0.5)
    for i in range(2):
        rows = [j for j in range(5) if valid[i, j]]
        size = value[i].abs().tolist()
        weights = [math.exp(sum(size[j]) / 3 / 0.5) for j in rows]
        expected = [len(rows) * w / sum(weights) for w in weights]
        assert spatial[i][valid[i]].tolist() == pytest.approx(expected, rel=1e-9)
        assert not spatial[i][~valid[i]].any()
        weights = [math.exp(sum(size[j][c] for j in rows) / len(rows) / 0.5) for c in range(3)]
        assert channel[i].tolist() == pytest.approx([3 * w / sum(weights) for w in weights], rel=1e-9)


def test_focal_losses_by_loops() -> None:
    student, teacher = maps(2, 3, 1)[:, :5].double(), maps(2, 3, 2)[:, :5].double()
    valid = torch.tensor([[True] * 5, [True, False, True, True, False]])
    foreground = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.25, 0.0, 0.0]], dtype=torch.float64)
    found = focal_losses(student, teacher, foreground, valid, 0.5)
    (s_cells, s_channels), (t_cells, t_channels) = (attentions(v, valid, 0.5) for v in (student, teacher))
    fg = bg = attention = 0.0
    for i in range(2):
        behind = [j for j in range(5) if valid[i, j] and foreground[i, j] == 0]
        for c in range(3):
            attention += abs(number(s_channels[i, c] - t_channels[i, c]))
            for j in range(5):
                square = number((student[i, j, c] - teacher[i, j, c]) ** 2 * t_cells[i, j] * t_channels[i, c])
                fg += number(foreground[i, j]) * square
                bg += square / len(behind) if j in behind else 0.0
        attention += sum(abs(number(s_cells[i, j] - t_cells[i, j])) for j in range(5))
    assert number(found["fg"]) == pytest.approx(fg, rel=1e-9)
    assert number(found["bg"]) == pytest.approx(bg, rel=1e-9)
    assert number(found["attention"]) == pytest.approx(attention, rel=1e-9)


def test_the_context_block_starts_by_adding_nothing_and_reads_valid_cells() -> None:
    torch.manual_seed(0)
    block, value = ContextBlock(8), maps(1)[:, :4]
    valid = torch.tensor([[True, True, False, True]])
    assert not block(value, valid).any()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    added = block(value, valid)
    assert added.shape == (1, 1, 8)
    pooled = (value[0, [0, 1, 3]] @ block.pool.weight[0]).softmax(dim=0) @ value[0, [0, 1, 3]]
    torch.testing.assert_close(added[0, 0], block.add(pooled))


def test_fgd_is_its_parts() -> None:
    batch = make_batch([TWO, ONE])
    ours, theirs = maps(2, seed=1), maps(2, seed=2)
    method = FGD(make_pair(), fg_weight=1.0, bg_weight=2.0, attention_weight=3.0, relation_weight=4.0)
    split = (torch.split(v, [h * w for h, w in SHAPES], dim=1) for v in (ours, theirs, batch.targets.valid))
    expected = dict.fromkeys(("fg", "bg", "attention", "relation"), 0.0)
    for level, (s, t, v) in enumerate(zip(*split, strict=True)):
        mask = foreground_mask(batch.targets.boxes, v, GRID, CANVAS, level)
        values = focal_losses(s, t, mask, v, 0.5) | {"relation": relation_loss(s, t, v)}
        for name, value in values.items():
            expected[name] += number(value) / 2
    found = run(method, ours, theirs, batch)
    for weight, name in enumerate(expected, 1):
        assert number(found[name]) == pytest.approx(weight * expected[name], rel=1e-5)


def test_equal_maps_have_no_loss() -> None:
    batch, ours = make_batch([TWO]), maps(1)
    terms = run(FGD(make_pair()), ours, ours.detach().clone(), batch)
    assert all(number(t) == 0 for t in terms.values())


def test_a_part_of_weight_0_is_absent_and_brings_no_parameters() -> None:
    method = FGD(make_pair(), relation_weight=0.0, bg_weight=0.0)
    assert list(run(method, maps(1), maps(1, seed=2), make_batch([ONE]))) == ["fg", "attention"]
    assert list(method.parameters()) == []
    assert run(FGD(make_pair(), fg_weight=0.0, bg_weight=0.0, attention_weight=0.0, relation_weight=0.0),
               maps(1), maps(1), make_batch([ONE])) == {}  # fmt: skip


def test_a_box_over_everything_leaves_no_background() -> None:
    whole = make_batch([torch.tensor([[0.0, 0.0, 128.0, 64.0]])], (64, 128))
    method = FGD(make_pair())
    assert not method.active(whole, "bg")
    assert number(run(method, maps(1), maps(1, seed=2), whole)["bg"]) == 0


def test_crowds_are_vectorised() -> None:
    canvas = Canvas(320, 320)
    low = torch.rand(300, 2) * 280
    boxes = torch.cat([low, low + 5 + torch.rand(300, 2) * 30], dim=1)
    batch = make_batch([boxes, boxes[:1]], (320, 320), canvas)
    method = FGD(make_pair())
    terms = run(method, maps(2, seed=1, canvas=canvas), maps(2, seed=2, canvas=canvas), batch)
    assert all(torch.isfinite(t) for t in terms.values())


def test_weights_by_detector() -> None:
    assert resolve_options("fgd", FGD, "faster_rcnn", {})["relation_weight"] == 5e-7
    assert resolve_options("fgd", FGD, "gfl", {})["attention_weight"] == 5e-4
    assert resolve_options("fgd", FGD, "fcos", {})["temperature"] == 0.8
    assert FGD(make_pair()).weight_option("bg") == "bg_weight"


def test_faster_rcnn_has_four_levels() -> None:
    """The official two-stage configurations name neck.fpn_convs.0 to 3: P2 to P5, not the pooled P6."""
    pair = replace(make_pair(8, 16), detector="faster_rcnn")
    method = FGD(pair, **resolve_options("fgd", FGD, "faster_rcnn", {}))
    assert [len(part) for part in (method.adapters, method.student, method.teacher)] == [4, 4, 4]
    batch, ours, theirs = make_batch([TWO, ONE]), maps(2, 8, seed=1), maps(2, 16, seed=2)
    torch.stack(list(run(method, ours, theirs, batch).values())).sum().backward()
    reached = [bool(level.any()) for level in GRID.split_levels(grad(ours), CANVAS)]
    assert reached == [True, True, True, True, False]
    assert all(p.grad is not None for p in method.parameters())
    assert len(FGD(make_pair()).adapters) == 5
