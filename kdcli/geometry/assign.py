"""Static label assignment: which ground-truth box each anchor is trained for.

Everything is computed in float64 on the CPU from float32 boxes, in the data worker, so that the result does not depend
on the device or on the training precision. An assigner is a function of (spec, grid, canvas, boxes, content); another
kind is one more function in ``_KINDS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kdcli.errors import OptionError, nearest
from kdcli.geometry.boxes import area, encode_distances, pairwise_iou
from kdcli.geometry.grid import Grid
from kdcli.geometry.spec import JsonSpec
from kdcli.structures import BACKGROUND, IGNORED, Canvas

MIN_INSIDE = 0.01  # px that a positive's centre lies inside its box: mmdet's ATSS
TIE = 1e-6  # IoUs closer than this are equal: a box inside several anchors has the same IoU with each but for rounding
CHUNK = 4_000_000  # box x anchor pairs at a time: 32 MB a temporary; 100 boxes on RetinaNet's 201,600 anchors are 20 M


@dataclass(frozen=True)
class AssignerSpec(JsonSpec):
    """Parameters of an assigner; ``topk`` is read by ATSS alone, the IoU thresholds by max_iou alone, ``ranges`` and
    ``center_radius`` by FCOS alone.

    ranges: the largest distance from a point to the farthest edge of its box, in canvas pixels, on each level but the
    last. center_radius: a point lies less than so many strides from the centre of its box, in x and in y; 0: anywhere
    inside.
    """

    kind: Literal["atss", "max_iou", "fcos", "none"]
    topk: int = 9
    pos_iou: float = 0.5
    neg_iou: float = 0.4
    min_pos_iou: float = 0.0
    ranges: tuple[float, ...] = (64.0, 128.0, 256.0, 512.0)
    center_radius: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise OptionError(f"assigner '{self.kind}' is unknown{nearest(self.kind, _KINDS)}")
        if self.topk < 1 or not 0 <= self.min_pos_iou <= 1 or not 0 <= self.neg_iou <= self.pos_iou <= 1:
            raise OptionError(f"{self}: topk must be >= 1 and 0 <= neg_iou <= pos_iou <= 1, 0 <= min_pos_iou <= 1")
        if self.center_radius < 0 or any(high <= low for low, high in pairwise((0.0, *self.ranges))):
            raise OptionError(f"{self}: ranges must be positive and ascend, center_radius must not be negative")


@dataclass(frozen=True)
class Candidates:
    """The anchors closest to each of G boxes, on every level: c = levels * topk columns."""

    index: Tensor  # [G, c] int64, 0 where a level has fewer valid anchors than topk
    real: Tensor  # [G, c] bool, False at those
    iou: Tensor  # [G, c] float64, with the box
    threshold: Tensor  # [G] float64, mean + standard deviation (unbiased) of the IoUs


def closest_anchors(
    grid: Grid, canvas: Canvas, boxes: Tensor, content: tuple[int, int], topk: int
) -> tuple[Tensor, Tensor]:
    """The ``topk`` valid anchors of each level closest to each box by centre distance, lower index first in a tie.

    Boxes [G, 4] float64. Returns (index [G, levels * topk] int64, real [G, levels * topk] bool). The anchors of a cell
    share its centre, so ``cells`` = ceil(topk / A) cells are looked for, in a window around the nearest one.
    """
    per_cell = grid.num_anchors
    cells = -(-topk // per_cell)
    shapes = grid.valid_shapes(canvas, content)
    window, step, width, first = _windows(grid, canvas, _reach(grid, shapes, cells))
    center = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2  # [G, 1, 2] x, y
    # all levels at once [G, L, window]: one by one is three times as slow for the 6 boxes of a usual image
    limit = torch.tensor(shapes).flip(1)
    near = torch.ceil(center / step - grid.offset - 0.5).long().clamp(min=0).minimum(limit - 1)
    col, row = near[..., :1] + window[:, 1], near[..., 1:] + window[:, 0]
    real = (col >= 0) & (col < limit[:, :1]) & (row >= 0) & (row < limit[:, 1:])
    dx = (col + grid.offset) * step[:, :1] - center[..., :1]
    dy = (row + grid.offset) * step[:, 1:] - center[..., 1:]
    distance = (dx**2 + dy**2).masked_fill(~real, torch.inf)
    best = distance.sort(dim=-1, stable=True).indices[..., :cells]
    cell = (row * width + col).masked_fill(~real, 0).gather(-1, best)
    anchor = first + cell[..., None] * per_cell + torch.arange(per_cell)
    kept = real.gather(-1, best).repeat_interleave(per_cell, dim=-1)[..., :topk]
    return anchor.flatten(2)[..., :topk].masked_fill(~kept, 0).flatten(1), kept.flatten(1)


def _reach(grid: Grid, shapes: list[tuple[int, int]], cells: int) -> int:
    """How many rows and columns from the nearest cell the ``cells`` closest ones can lie; ``shapes``: valid cells.

    A cell j columns away has j closer ones in its own row. The row beside it, where there is one, has j more: nearer rows
    anyway, and the next row out because a box's centre lies at most one step outside of the cells' (on a nominal grid) and
    j is over 2 then. For the nine of ATSS that makes a window of 81 cells instead of 289.
    """
    two = grid.stride_rule == "nominal" and min(min(shape) for shape in shapes) >= 2
    return min(cells - 1, max(2, -(-cells // 2) - 1)) if two else cells - 1


@lru_cache(maxsize=64)
def _windows(grid: Grid, canvas: Canvas, reach: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row, column) of a window's cells, row-major: ascending index; and of each level the steps, columns, first anchor."""
    span = torch.arange(-reach, reach + 1)
    sizes = torch.tensor(grid.level_sizes(canvas))
    width = torch.tensor([[w] for _, w in grid.level_shapes(canvas)])
    first = (sizes.cumsum(0) - sizes)[:, None, None]
    return torch.cartesian_prod(span, span), torch.tensor(grid.steps(canvas)).flip(1), width, first


def atss_candidates(grid: Grid, canvas: Canvas, boxes: Tensor, content: tuple[int, int], topk: int) -> Candidates:
    """ATSS's candidates and its per-box IoU threshold (arXiv 1912.02424), for boxes [G, 4] float64.

    The tensors are shared with the next call: never modify one in place.
    """
    return _candidates(grid, canvas, boxes.numpy().tobytes(), content, topk)


@lru_cache(maxsize=1)
def _candidates(grid: Grid, canvas: Canvas, packed: bytes, content: tuple[int, int], topk: int) -> Candidates:
    # the last one is kept: the assigner and the VLR of an image ask for the same, 0.6 ms each
    boxes = torch.from_numpy(np.frombuffer(packed).copy()).reshape(-1, 4)
    index, real = closest_anchors(grid, canvas, boxes, content, topk)
    anchors = grid.anchors(canvas)[index]  # [G, c, 4]
    lt = torch.maximum(anchors[..., :2], boxes[:, None, :2])
    rb = torch.minimum(anchors[..., 2:], boxes[:, None, 2:])
    inter = (rb - lt).clamp(min=0).prod(dim=-1)
    size = (anchors[..., 2:] - anchors[..., :2]).prod(dim=-1) + (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1)[:, None]
    iou = (inter / (size - inter)).masked_fill(~real, 0.0)
    count = real.sum(dim=1)
    mean = iou.sum(dim=1) / count
    deviation = ((iou - mean[:, None]) * real).square().sum(dim=1) / (count - 1).clamp(min=1)
    return Candidates(index, real, iou, mean + deviation.sqrt())


def highest_iou(anchor: Tensor, box: Tensor, iou: Tensor, total: int) -> Tensor:
    """Of pairs (anchor [p], box [p], iou [p]) keep each anchor's best box, the lowest in a tie: [total] int64.

    Anchors in no pair hold BACKGROUND.
    """
    best = torch.full((total,), -torch.inf, dtype=iou.dtype).scatter_reduce(0, anchor, iou, "amax")
    won = iou == best[anchor]
    none = torch.iinfo(torch.int64).max
    owner = torch.full((total,), none).scatter_reduce(0, anchor[won], box[won], "amin")
    return owner.masked_fill(owner == none, BACKGROUND)


def _atss(spec: AssignerSpec, grid: Grid, canvas: Canvas, boxes: Tensor, content: tuple[int, int]) -> Tensor:
    found = atss_candidates(grid, canvas, boxes, content, spec.topk)
    centers = grid.centers(canvas)[found.index // grid.num_anchors]  # [G, c, 2]
    inside = encode_distances(centers, boxes[:, None]).amin(dim=-1) > MIN_INSIDE
    box, column = torch.nonzero(found.real & inside & (found.iou >= found.threshold[:, None]), as_tuple=True)
    return highest_iou(found.index[box, column], box, found.iou[box, column], grid.num_total(canvas))


def _max_iou(spec: AssignerSpec, grid: Grid, canvas: Canvas, boxes: Tensor, content: tuple[int, int]) -> Tensor:
    """IoU thresholds; then each box takes the anchor it overlaps most, at any IoU; the later box wins a conflict."""
    usable = torch.nonzero(grid.valid_anchors(canvas, content)).squeeze(1)
    anchors = grid.anchors(canvas)[usable]
    best = torch.zeros(len(usable), dtype=torch.float64)
    owner = torch.zeros(len(usable), dtype=torch.int64)
    forced, size = torch.full((len(usable),), BACKGROUND), max(1, CHUNK // len(usable))
    for start in range(0, len(boxes), size):
        iou = pairwise_iou(boxes[start : start + size], anchors)
        top, index = iou.max(dim=0)
        owner = torch.where(top > best, index + start, owner)
        best = torch.maximum(best, top)
        peak = iou.amax(dim=1)
        first = (iou >= peak[:, None] - TIE).to(torch.uint8).argmax(dim=1)  # argmax gives the first of equals
        matched = (peak >= spec.min_pos_iou) & (peak > 0)
        numbers = torch.arange(start, start + len(peak))
        forced = forced.scatter_reduce(0, first[matched], numbers[matched], "amax")
    chosen = torch.where(best >= spec.pos_iou, owner, IGNORED).masked_fill(best < spec.neg_iou, BACKGROUND)
    chosen = torch.where(forced >= 0, forced, chosen)
    return torch.full((grid.num_total(canvas),), IGNORED).index_copy(0, usable, chosen)


def _fcos(spec: AssignerSpec, grid: Grid, canvas: Canvas, boxes: Tensor, content: tuple[int, int]) -> Tensor:
    """The smallest box around each point whose farthest edge lies in the range of the point's level, ends included."""
    assert grid.num_anchors == 1
    assert len(spec.ranges) == len(grid.strides) - 1
    points = grid.centers(canvas)  # [P, 2]
    limits = torch.tensor([-1.0, *spec.ranges, torch.inf], dtype=torch.float64)
    sizes = torch.tensor(grid.level_sizes(canvas))
    low, high = limits[:-1].repeat_interleave(sizes), limits[1:].repeat_interleave(sizes)
    radius = spec.center_radius * grid.anchor_strides(canvas)
    best = torch.full((len(points),), torch.inf, dtype=torch.float64)
    owner = torch.full((len(points),), BACKGROUND)
    size = max(1, CHUNK // (4 * len(points)))
    for start in range(0, len(boxes), size):
        part = boxes[start : start + size, None]  # [g, 1, 4]
        distances = encode_distances(points, part)  # [g, P, 4]
        farthest = distances.amax(dim=-1)
        fits = (distances.amin(dim=-1) > 0) & (farthest >= low) & (farthest <= high)
        if spec.center_radius:
            middle = (part[..., :2] + part[..., 2:]) / 2
            fits &= (points - middle).abs().amax(dim=-1) < radius
        areas = area(part).expand_as(fits).masked_fill(~fits, torch.inf)
        index = areas.argmin(dim=0)  # the first of equals, as in mmdet
        least = areas.gather(0, index[None])[0]
        owner = torch.where(least < best, index + start, owner)
        best = torch.minimum(best, least)
    return owner


def _none(spec: AssignerSpec, grid: Grid, canvas: Canvas, boxes: Tensor, content: tuple[int, int]) -> Tensor:
    """Nothing is positive: a two-stage detector matches in its own loss (0.2 s an image at 800x1344 are saved)."""
    return torch.full((grid.num_total(canvas),), BACKGROUND)


_Assigner = Callable[[AssignerSpec, Grid, Canvas, Tensor, tuple[int, int]], Tensor]
_KINDS: dict[str, _Assigner] = {"atss": _atss, "max_iou": _max_iou, "fcos": _fcos, "none": _none}


def assign(spec: AssignerSpec, grid: Grid, canvas: Canvas, boxes: Tensor, content: tuple[int, int]) -> Tensor:
    """Assign one image's boxes [G, 4] (float32 xyxy canvas pixels) to the N anchors.

    Returns [N] int32: index of the box, BACKGROUND, or IGNORED (between two IoU thresholds, or outside the valid area
    of the content (height, width); FCOS ignores nothing, as mmdet's trains on the padding as background). Sources: ATSS
    arXiv 1912.02424, max-IoU arXiv 1708.02002, FCOS arXiv 1904.01355, all as in mmdet.
    """
    if len(boxes) == 0:
        assigned = torch.full((grid.num_total(canvas),), BACKGROUND)
    else:
        assigned = _KINDS[spec.kind](spec, grid, canvas, boxes.double(), content)
    if spec.kind == "fcos":
        return assigned.to(torch.int32)
    return assigned.masked_fill(~grid.valid_anchors(canvas, content), IGNORED).to(torch.int32)


def follows_from_positives(spec: AssignerSpec) -> bool:
    """Whether ``from_positives`` can tell what ``assign`` gave: not where anchors lie between two IoU thresholds."""
    return spec.kind != "max_iou"


def from_positives(
    spec: AssignerSpec, grid: Grid, canvas: Canvas, content: tuple[int, int], index: Tensor, box: Tensor
) -> Tensor:
    """What ``assign`` gave, [N] int32, from its positives: anchors ``index`` [p] int64 and their ``box`` [p].

    A tenth of its time: the boxes are not looked at. For a spec that ``follows_from_positives``.
    """
    assigned = torch.full((grid.num_total(canvas),), BACKGROUND, dtype=torch.int32)
    if spec.kind != "fcos":
        assigned.masked_fill_(~grid.valid_anchors(canvas, content), IGNORED)
    return assigned.index_copy_(0, index, box.to(torch.int32))
