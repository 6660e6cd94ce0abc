"""Static label assignment: which ground-truth box each anchor is trained for.

Everything is computed in float64 on the CPU from float32 boxes, in the data worker, so that the result does not depend
on the device or on the training precision. An assigner is a function of (spec, grid, canvas, boxes, content); another
kind is one more function in ``_KINDS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcli.errors import OptionError, did_you_mean
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
    _: KW_ONLY
    topk: int = 9
    pos_iou: float = 0.5
    neg_iou: float = 0.4
    min_pos_iou: float = 0.0
    ranges: tuple[float, ...] = (64.0, 128.0, 256.0, 512.0)
    center_radius: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise OptionError(f"assigner '{self.kind}' is unknown{did_you_mean(self.kind, _KINDS)}")
        if self.topk < 1 or not 0 <= self.min_pos_iou <= 1 or not 0 <= self.neg_iou <= self.pos_iou <= 1:
            raise OptionError(f"{self}: topk must be >= 1 and 0 <= neg_iou <= pos_iou <= 1, 0 <= min_pos_iou <= 1")
        if self.center_radius < 0 or any(high <= low for low, high in pairwise((0.0, *self.ranges))):
            raise OptionError(f"{self}: ranges must be positive and ascend, center_radius must not be negative")


@dataclass(frozen=True)
class Candidates:
    """The anchors closest to each of G boxes, on every level: c = levels * topk columns.

    Numpy arrays, as all that leads to them: of a usual image they are small, and what an operation costs is its start
    (finding these for 6 boxes takes 0.2 ms, and 0.4 in torch).
    """

    index: NDArray[np.int64]  # [G, c], 0 where a level has fewer valid anchors than topk
    real: NDArray[np.bool_]  # [G, c], False at those
    iou: NDArray[np.float64]  # [G, c], with the box
    threshold: NDArray[np.float64]  # [G], mean + standard deviation (unbiased) of the IoUs


def closest_anchors(
    grid: Grid, canvas: Canvas, boxes: NDArray[np.float64], content: tuple[int, int], topk: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The ``topk`` valid anchors of each level closest to each box by centre distance, lower index first in a tie.

    Boxes [G, 4]. Returns (index [G, levels * topk], real [G, levels * topk]). The anchors of a cell share its centre, so
    ``cells`` = ceil(topk / A) cells are looked for, in a window around the nearest one.
    """
    per_cell = grid.num_anchors
    cells = -(-topk // per_cell)
    shapes = grid.valid_shapes(canvas, content)
    down, across, step, width, first = _windows(grid, canvas, _reach(grid, shapes, cells))
    # all levels at once [G, L, window]: one by one is three times as slow for the 6 boxes of a usual image
    center = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2  # [G, 1, 2] x, y
    limit = np.array(shapes)[:, ::-1]
    near = np.minimum(np.maximum(np.ceil(center / step - grid.offset - 0.5).astype(np.int64), 0), limit - 1)
    col, row = near[..., :1] + across, near[..., 1:] + down
    real = (col >= 0) & (col < limit[:, :1]) & (row >= 0) & (row < limit[:, 1:])
    dx = (col + grid.offset) * step[:, :1] - center[..., :1]
    dy = (row + grid.offset) * step[:, 1:] - center[..., 1:]
    distance = np.where(real, dx * dx + dy * dy, np.inf)
    best = distance.argsort(axis=-1, kind="stable")[..., :cells]
    kept = np.take_along_axis(real, best, axis=-1)
    cell = np.take_along_axis(row * width + col, best, axis=-1)
    anchor = (first + cell[..., None] * per_cell + np.arange(per_cell)).reshape(*cell.shape[:2], -1)[..., :topk]
    kept = kept.repeat(per_cell, axis=-1)[..., :topk]
    return np.where(kept, anchor, 0).reshape(len(boxes), -1), kept.reshape(len(boxes), -1)


def _reach(grid: Grid, shapes: list[tuple[int, int]], cells: int) -> int:
    """How many rows and columns from the nearest cell the ``cells`` closest ones can lie; ``shapes``: valid cells.

    A cell j columns away has j closer ones in its own row. The row beside it, where there is one, has j more: nearer rows
    anyway, and the next row out because a box's centre lies at most one step outside of the cells' (on a nominal grid) and
    j is over 2 then. For the nine of ATSS that makes a window of 81 cells instead of 289.
    """
    two = grid.stride_rule == "nominal" and min(min(shape) for shape in shapes) >= 2
    return min(cells - 1, max(2, -(-cells // 2) - 1)) if two else cells - 1


@lru_cache(maxsize=64)
def _windows(grid: Grid, canvas: Canvas, reach: int) -> tuple[NDArray[Any], ...]:
    """Row and column of a window's cells, row-major: ascending index; and of each level the steps, columns, first anchor."""
    span = np.arange(-reach, reach + 1)
    width = np.array([[w] for _, w in grid.level_shapes(canvas)])
    sizes = np.array(grid.level_sizes(canvas))
    first = (sizes.cumsum() - sizes)[:, None, None]
    return span.repeat(len(span)), np.tile(span, len(span)), np.array(grid.steps(canvas))[:, ::-1], width, first


def atss_candidates(grid: Grid, canvas: Canvas, boxes: Tensor, content: tuple[int, int], topk: int) -> Candidates:
    """ATSS's candidates and its per-box IoU threshold (arXiv 1912.02424), for boxes [G, 4] float64.

    They are shared with the next call: never modify one in place.
    """
    return _candidates(grid, canvas, boxes.numpy().tobytes(), content, topk)


@lru_cache(maxsize=1)
def _candidates(grid: Grid, canvas: Canvas, packed: bytes, content: tuple[int, int], topk: int) -> Candidates:
    # the last one is kept: the assigner and the VLR of an image ask for the same
    boxes = np.frombuffer(packed).reshape(-1, 4)
    index, real = closest_anchors(grid, canvas, boxes, content, topk)
    x1, y1, x2, y2 = np.moveaxis(grid.anchors(canvas).numpy()[index], -1, 0)  # [G, c]
    left, top, right, bottom = boxes.T[..., None]  # [G, 1]
    width = np.maximum(np.minimum(x2, right) - np.maximum(x1, left), 0)
    inter = width * np.maximum(np.minimum(y2, bottom) - np.maximum(y1, top), 0)
    iou = np.where(real, inter / ((x2 - x1) * (y2 - y1) + (right - left) * (bottom - top) - inter), 0.0)
    count = real.sum(axis=1)
    mean = iou.sum(axis=1) / count
    deviation = np.square((iou - mean[:, None]) * real).sum(axis=1) / np.maximum(count - 1, 1)
    return Candidates(index, real, iou, mean + np.sqrt(deviation))


def _atss(spec: AssignerSpec, grid: Grid, canvas: Canvas, boxes: Tensor, content: tuple[int, int]) -> Tensor:
    """Each box's candidates above its threshold, whose centre lies inside it; an anchor of several takes the box of the
    highest IoU, the first in a tie."""
    found = atss_candidates(grid, canvas, boxes, content, spec.topk)
    box, column = np.nonzero(found.real & (found.iou >= found.threshold[:, None]))
    anchor, iou = found.index[box, column], found.iou[box, column]
    center, edges = grid.centers(canvas).numpy()[anchor // grid.num_anchors], boxes.numpy()[box]
    inside = (np.concatenate([center - edges[:, :2], edges[:, 2:] - center], axis=1) > MIN_INSIDE).all(axis=1)
    order = np.lexsort((-box[inside], iou[inside]))  # whoever comes last is kept
    owner = np.full(grid.num_total(canvas), BACKGROUND)
    owner[anchor[inside][order]] = box[inside][order]
    return torch.from_numpy(owner)


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
