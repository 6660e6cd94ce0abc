"""The cells that DeFeat counts as foreground (CVPR 2021, arXiv 2103.14475).

Each ground-truth box belongs to one level, chosen by its size, and marks the cells there that it covers after its
corners were cut to whole cells; everything else is background. The rule is that of the official code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.geometry.grid import Grid
from kdcli.structures import Canvas

FINEST_SIDE = 56.0  # pixels: level 0 ends at twice this, 112, each further level at twice the one before
LEVEL_EPS = 1e-6  # so that a side of exactly 112 is level 1


def box_levels(boxes: Tensor, num_levels: int) -> Tensor:
    """Level [...] int64 (0 = finest) of each box [..., 4] (canvas pixels): by its side, whatever the strides are."""
    sides = (boxes[..., 2:] - boxes[..., :2]).double() + 1
    octave = torch.log2(sides.clamp(min=0).prod(dim=-1).sqrt() / FINEST_SIDE + LEVEL_EPS)
    return octave.floor().clamp(0, num_levels - 1).long()


def defeat_cells(boxes: Tensor, grid: Grid, canvas: Canvas) -> Tensor:
    """Cells [..., P] bool that lie in a box, each box on its own level; ``boxes`` [..., G, 4], xyxy canvas pixels.

    A box without area marks nothing, so that the images of a batch can be padded to one count. A box that covers no
    whole cell in one direction marks a single cell, that of its top-left corner.
    """
    levels = box_levels(boxes, len(grid.strides))
    shapes = zip(grid.strides, grid.level_shapes(canvas), strict=True)
    return torch.cat([covered(boxes, stride, shape, levels == i) for i, (stride, shape) in enumerate(shapes)], dim=-1)


def stage_cells(boxes: Tensor, grid: Grid, canvas: Canvas, level: int) -> Tensor:
    """Cells [..., P of ``level``] bool of a backbone stage that lie in a box; ``boxes`` as for ``defeat_cells``.

    All boxes are drawn at the finest level's stride, and that mask is resized to the stage by taking the nearest cell.
    """
    shapes = grid.level_shapes(canvas)
    finest = covered(boxes, grid.strides[0], shapes[0], torch.ones_like(boxes[..., 0], dtype=torch.bool))
    mask = finest.reshape(-1, 1, *shapes[0]).float()
    resized = F.interpolate(mask, size=shapes[level], mode="nearest") > 0
    return resized.reshape(*boxes.shape[:-2], -1)


def covered(boxes: Tensor, stride: int, shape: tuple[int, int], usable: Tensor) -> Tensor:
    """Cells [..., rows * columns] bool of one level that a ``usable`` [..., G] box of ``boxes`` [..., G, 4] covers.

    From the truncated top-left corner to the truncated bottom-right one, which is outside.
    """
    rows, columns = shape
    last = boxes.new_tensor([columns, rows], dtype=torch.float64)
    low = (boxes[..., :2].double() / stride).trunc().clamp(min=0).minimum(last - 1)
    high = (boxes[..., 2:].double() / stride).trunc().minimum(last)
    high = torch.where((high <= low).any(dim=-1, keepdim=True), low + 1, high)
    usable = usable & (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
    x, y = (torch.arange(n, dtype=torch.float64, device=boxes.device) for n in (columns, rows))
    in_x = (x >= low[..., 0, None]) & (x < high[..., 0, None])  # [..., G, columns]
    in_y = (y >= low[..., 1, None]) & (y < high[..., 1, None]) & usable[..., None]
    # how many boxes cover a cell: a product of two small matrices, where [G, P] would be 7 million for 300 boxes
    count = in_y.float().transpose(-1, -2) @ in_x.float()
    return (count > 0).flatten(-2)
