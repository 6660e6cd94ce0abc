"""The sparse regions where teacher tensors are read: a pure function of ground truth and geometry.

``main`` are the positives of the student's assigner. ``vlr``, the valuable localization region of LD (arXiv
2102.12252), are anchors that overlap a box, though less than a positive does. ``fine_grained`` (arXiv 1906.03609, as LD's
repository uses it) are cells with an anchor that overlaps a box at least half as much as the best anchor does, ``inside``
those whose centre lies in a box. ``object`` and ``sample`` are DeFeat's foreground cells and a random share of its
background (arXiv 2103.14475). Computed in float64 on the CPU; the index that a store holds is what distillation reads,
guarded by ``guard``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcli.errors import OptionError
from kdcli.geometry.assign import CHUNK, atss_candidates
from kdcli.geometry.boxes import EPS, pairwise_iou
from kdcli.geometry.defeat_mask import defeat_cells
from kdcli.geometry.grid import Grid
from kdcli.geometry.spec import JsonSpec
from kdcli.structures import FINE_GRAINED, FLAGS, INSIDE, MAIN, OBJECT, SAMPLE, VLR, Canvas, Entries
from kdcli.tensors import Region

FINE_GRAINED_SHARE = 0.5  # of a box's highest IoU


@dataclass(frozen=True)
class RegionSpec(JsonSpec):
    """What the valuable localization region is: gamma * alpha <= metric < alpha; and the share of a thinned background."""

    # official: LD's repository, whose union is the anchor's area. inside: background points inside a box (LD on FCOS)
    vlr_metric: Literal["diou", "official", "inside"] = "diou"
    vlr_gamma: float = 0.25
    vlr_alpha: float | None = None  # None: ATSS's mean + deviation of the IoUs of a box's closest anchors
    vlr_topk: int = 9  # closest anchors a level for that statistic
    vlr_keep_positives: bool = True  # False (RetinaNet): positives of the assigner are not in the region
    keep: float = 0.1  # probability with which a background cell is in ``sample``

    def __post_init__(self) -> None:
        if self.vlr_metric not in ("diou", "official", "inside"):
            raise OptionError(f"vlr_metric '{self.vlr_metric}' is unknown; choose from diou, official, inside")
        if not 0 < self.keep <= 1:
            raise OptionError(f"keep {self.keep}: must be a share above 0, at most 1")
        if not 0 <= self.vlr_gamma <= 1:
            raise OptionError(f"vlr_gamma {self.vlr_gamma}: must be a share from 0 to 1")
        if self.vlr_topk < 1:
            raise OptionError(f"vlr_topk {self.vlr_topk}: must be at least 1")
        if self.vlr_alpha is not None and not 0 < self.vlr_alpha <= 1:
            raise OptionError(f"vlr_alpha {self.vlr_alpha}: must be an IoU above 0, at most 1, or none")


def vlr_weights(spec: RegionSpec, grid: Grid, canvas: Canvas, boxes: Tensor, content: tuple[int, int]) -> Tensor:
    """IoU of each anchor with the best box whose region it is in, [N] float64; 0 outside the region.

    ``boxes`` [G, 4] xyxy canvas pixels, ``content`` (height, width) in pixels. Does not look at positives. With the
    metric ``inside`` there is no IoU to weigh by: 1 for every anchor whose centre lies inside a box.
    """
    weights = torch.zeros(grid.num_total(canvas), dtype=torch.float64)
    if len(boxes) == 0:
        return weights
    boxes = boxes.double()
    valid = grid.valid_anchors(canvas, content)
    if spec.vlr_metric == "inside":
        within = inside_cells(grid, canvas, boxes).repeat_interleave(grid.num_anchors)
        return weights.masked_fill(within & valid, 1.0)
    if spec.vlr_alpha is None:
        alpha = atss_candidates(grid, canvas, boxes, content, spec.vlr_topk).threshold
    else:
        alpha = np.full(len(boxes), spec.vlr_alpha)
    # numpy: 0.2 ms for the 6 boxes of a usual image, where torch takes 0.45
    columns, anchors = boxes.numpy().T, grid.anchor_columns(canvas).numpy()
    size = max(1, CHUNK // anchors.shape[1])
    for start in range(0, len(boxes), size):
        # where they do not overlap, neither metric is above 0: four comparisons spare three of four pairs the rest
        left, top, right, bottom = columns[:, start : start + size, None]
        near = (left < anchors[2]) & (anchors[0] < right) & (top < anchors[3]) & (anchors[1] < bottom) & valid.numpy()
        box, anchor = np.divmod(np.flatnonzero(near), anchors.shape[1])
        box += start
        value, iou = vlr_metric(spec.vlr_metric, columns.take(box, axis=1), anchors.take(anchor, axis=1))
        high = alpha[box]
        inside = (value < high) & (value >= spec.vlr_gamma * high)
        np.maximum.at(weights.numpy(), anchor[inside], iou[inside])
    return weights


def vlr_metric(
    kind: str, boxes: NDArray[np.float64], anchors: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(metric, IoU) [...] of pairs of a box and an anchor, both [4, ...] xyxy, one row a coordinate.

    ``diou`` is the IoU minus the squared centre distance over the squared diagonal of the hull (arXiv 1911.08287). What
    LD's repository calls DIoU, ``official``, has the anchor's own area for a union: the first term is the covered share of
    the anchor.
    """
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = boxes, anchors
    width = np.maximum(np.minimum(ax2, bx2) - np.maximum(ax1, bx1), 0)
    inter = width * np.maximum(np.minimum(ay2, by2) - np.maximum(ay1, by1), 0)
    area = (bx2 - bx1) * (by2 - by1)
    iou = inter / np.maximum((ax2 - ax1) * (ay2 - ay1) + area - inter, EPS)
    first = iou if kind == "diou" else inter / np.maximum(area, EPS)
    hull_w = np.maximum(ax2, bx2) - np.minimum(ax1, bx1)
    hull_h = np.maximum(ay2, by2) - np.minimum(ay1, by1)
    dx, dy = (ax1 + ax2 - bx1 - bx2) / 2, (ay1 + ay2 - by1 - by2) / 2
    return first - (dx * dx + dy * dy) / (hull_w * hull_w + hull_h * hull_h + EPS), iou


def inside_cells(grid: Grid, canvas: Canvas, boxes: Tensor) -> Tensor:
    """Cells [P] bool whose centre, which is that of their anchors, lies strictly inside one of the boxes [G, 4]."""
    centers = grid.centers(canvas)
    found = torch.zeros(len(centers), dtype=torch.bool)
    size = max(1, CHUNK // len(centers))
    for start in range(0, len(boxes), size):
        part = boxes[start : start + size, None]
        found |= ((centers > part[..., :2]) & (centers < part[..., 2:])).all(dim=-1).any(dim=0)
    return found


def fine_grained_cells(grid: Grid, canvas: Canvas, boxes: Tensor, content: tuple[int, int]) -> Tensor:
    """Cells [P] bool with a valid anchor whose IoU with a box is above half of that box's highest (arXiv 1906.03609).

    ``boxes`` [G, 4] xyxy canvas pixels, ``content`` (height, width) in pixels.
    """
    usable = torch.nonzero(grid.valid_anchors(canvas, content)).squeeze(1)
    anchors = grid.anchors(canvas)[usable]
    near = torch.zeros(len(usable), dtype=torch.bool)
    size = max(1, CHUNK // len(usable))
    for start in range(0, len(boxes), size):
        iou = pairwise_iou(boxes[start : start + size].double(), anchors)
        near |= (iou > FINE_GRAINED_SHARE * iou.amax(dim=1, keepdim=True)).any(dim=0)
    whole = torch.zeros(grid.num_total(canvas), dtype=torch.bool).index_copy(0, usable, near)
    return whole.reshape(-1, grid.num_anchors).any(dim=1)


def sampled_cells(spec: RegionSpec, row: str, cells: int) -> Tensor:
    """A random choice [cells] bool, each with probability ``spec.keep``: of the row (image and view) alone, so that it is
    the same whenever and wherever it is drawn."""
    seed = int.from_bytes(hashlib.blake2b(f"sample {spec.keep} {row}".encode(), digest_size=8).digest(), "little") >> 1
    return torch.rand(cells, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < spec.keep


def compute_entries(
    regions: frozenset[str],
    spec: RegionSpec,
    grid: Grid,
    canvas: Canvas,
    boxes: Tensor,
    assigned: Tensor,
    content: tuple[int, int],
    row: str = "",
) -> Entries:
    """Entries of one image for ``regions``, names of FLAGS; sorted by index, each anchor once.

    ``boxes`` [G, 4] float32 xyxy canvas pixels, ``assigned`` [N] from ``assign``, ``content`` (height, width) pixels.
    ``row`` names the image and its view: what a random region is drawn from. Cells outside the valid area are in no
    region. Raises OptionError for another region.
    """
    for region in sorted(regions):
        if region not in FLAGS:
            raise OptionError(f"region '{region}' is not sparse; choose from {', '.join(FLAGS)}")
    total = grid.num_total(canvas)
    weight = torch.zeros(total, dtype=torch.float64)
    positive = (assigned >= 0) & grid.valid_anchors(canvas, content)
    gt = torch.where(positive, assigned.long(), -1) if Region.MAIN in regions else torch.full((total,), -1)
    flag = (gt >= 0).to(torch.uint8) * MAIN
    if Region.VLR in regions:
        weight = vlr_weights(spec, grid, canvas, boxes, content)
        if not spec.vlr_keep_positives or spec.vlr_metric == "inside":
            weight = weight.masked_fill(positive, 0.0)
        flag |= (weight > 0).to(torch.uint8) * VLR
    if Region.FINE_GRAINED in regions:
        flag |= _at_first_anchor(fine_grained_cells(grid, canvas, boxes, content), grid) * FINE_GRAINED
    if Region.INSIDE in regions:
        within = inside_cells(grid, canvas, boxes.double()) & grid.valid(canvas, content)
        flag |= _at_first_anchor(within, grid) * INSIDE
    if Region.OBJECT in regions or Region.SAMPLE in regions:
        valid = grid.valid(canvas, content)
        inside = defeat_cells(boxes, grid, canvas) & valid
        if Region.OBJECT in regions:
            flag |= _at_first_anchor(inside, grid) * OBJECT
        if Region.SAMPLE in regions:
            flag |= _at_first_anchor(sampled_cells(spec, row, len(valid)) & valid & ~inside, grid) * SAMPLE
    index = torch.nonzero(flag).squeeze(1)
    return Entries(
        index=index,
        flag=flag[index],
        gt=gt[index],
        weight=weight[index].float(),
        image=torch.zeros_like(index),
    )


def _at_first_anchor(cells: Tensor, grid: Grid) -> Tensor:
    """[N] uint8: 1 at the first anchor of each of the ``cells`` [P] bool."""
    flags = torch.zeros(len(cells), grid.num_anchors, dtype=torch.uint8)
    flags[:, 0] = cells.to(torch.uint8)
    return flags.reshape(-1)


def guard(boxes: Tensor, labels: Tensor, definition: str) -> bytes:
    """A 16-byte digest of what a row's entries depend on: boxes [G, 4], labels [G] and the region definition (JSON)."""
    digest = hashlib.blake2b(len(boxes).to_bytes(8, "little"), digest_size=16)
    digest.update(boxes.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes())
    digest.update(labels.detach().cpu().long().contiguous().numpy().astype("<i8").tobytes())
    digest.update(definition.encode())
    return digest.digest()
