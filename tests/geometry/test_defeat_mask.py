"""DeFeat's foreground cells: against a loop over the rule, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdcli.geometry.defeat_mask import box_levels, defeat_cells, stage_cells
from kdcli.geometry.grid import Grid
from kdcli.structures import Canvas

GRID, CANVAS = Grid(), Canvas(96, 128)
TWO = torch.tensor([[10.0, 12.0, 60.0, 50.0], [70.0, 8.0, 118.0, 58.0]])
SIZES = [h * w for h, w in GRID.level_shapes(CANVAS)]


def cells_by_loop(boxes: Tensor, grid: Grid, canvas: Canvas) -> Tensor:
    """The rule, one box and one cell at a time."""
    masks = [torch.zeros(shape, dtype=torch.bool) for shape in grid.level_shapes(canvas)]
    for x1, y1, x2, y2 in boxes.double().tolist():
        octave = math.floor(math.log2(math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1)) / 56 + 1e-6))
        level = min(max(octave, 0), len(masks) - 1)
        stride, (rows, columns) = grid.strides[level], masks[level].shape
        left, top = int(x1 / stride), int(y1 / stride)
        right, bottom = min(int(x2 / stride), columns), min(int(y2 / stride), rows)
        if left == right or top == bottom:
            masks[level][top, left] = True
        else:
            masks[level][top:bottom, left:right] = True
    return torch.cat([m.reshape(-1) for m in masks])


@pytest.mark.parametrize("strides", [(4, 8, 16, 32, 64), (8, 16, 32, 64, 128)])
@pytest.mark.parametrize("canvas", [Canvas(256, 320), Canvas(320, 256), Canvas(800, 1344)])
def test_cells_against_a_loop(strides: tuple[int, ...], canvas: Canvas) -> None:
    grid, generator = Grid(strides=strides), torch.Generator().manual_seed(0)
    limit = torch.tensor([canvas.width, canvas.height])
    for count in (0, 1, 4, 40):
        low = torch.rand(count, 2, generator=generator) * (limit - 2)
        side = 1 + torch.rand(count, 2, generator=generator) ** 3 * limit
        boxes = torch.cat([low, torch.minimum(low + side, limit)], dim=1)
        assert torch.equal(defeat_cells(boxes, grid, canvas), cells_by_loop(boxes, grid, canvas))


def test_levels_do_not_depend_on_the_number_of_levels_but_for_the_last() -> None:
    sides = torch.tensor([1.0, 110, 111, 222, 223, 446, 447, 894, 895, 4000])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=-1)
    assert box_levels(boxes, 5).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert box_levels(boxes, 3).tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 2, 2]
    wide = torch.tensor([[0.0, 0, 447, 27]])  # 448 * 28 = 112^2: the size is the area's
    assert box_levels(wide, 5).tolist() == [1]


def test_images_can_be_padded_to_one_count() -> None:
    images = (TWO, torch.zeros(0, 4), torch.cat([TWO / 3, TWO / 2, TWO]))
    padded = torch.zeros(3, 6, 4)
    for image, boxes in enumerate(images):
        padded[image, : len(boxes)] = boxes
    together = defeat_cells(padded, GRID, CANVAS)
    assert torch.equal(together, torch.stack([defeat_cells(boxes, GRID, CANVAS) for boxes in images]))
    assert torch.equal(stage_cells(padded, GRID, CANVAS, 1)[0], stage_cells(TWO, GRID, CANVAS, 1))


def test_a_box_always_marks_a_cell() -> None:
    tiny = torch.tensor([[40.2, 33.1, 41.3, 34.2], [127.0, 95.0, 128.0, 96.0]])
    mask = defeat_cells(tiny, GRID, CANVAS)[: SIZES[0]].reshape(12, 16)
    assert torch.nonzero(mask).tolist() == [[4, 5], [11, 15]]


def test_stage_cells_take_the_nearest_fine_cell() -> None:
    boxes = torch.tensor([[8.0, 16.0, 64.0, 48.0]])  # columns 1-7, rows 2-5 at stride 8
    fine = stage_cells(boxes, GRID, CANVAS, 0).reshape(12, 16)
    assert torch.nonzero(fine).tolist() == [[y, x] for y in range(2, 6) for x in range(1, 8)]
    assert torch.equal(stage_cells(boxes, GRID, CANVAS, 1).reshape(6, 8), fine[::2, ::2])
    assert torch.equal(stage_cells(boxes, GRID, CANVAS, 2).reshape(3, 4), fine[::4, ::4])
    large = torch.tensor([[0.0, 0.0, 128.0, 96.0]])  # not moved to a coarser level
    assert stage_cells(large, GRID, CANVAS, 0).all()
