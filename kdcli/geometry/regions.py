"""The sparse regions where teacher tensors are read: a pure function of ground truth and geometry.

``main`` are the positives of the student's assigner. ``vlr``, the valuable localization region of LD (arXiv
2102.12252), are anchors that overlap a box, though less than a positive does. Computed in float64 on the CPU; the index
that a store holds is what distillation reads, guarded by ``guard``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdcli.errors import OptionError
from kdcli.geometry.assign import CHUNK, atss_candidates
from kdcli.geometry.boxes import aligned_iou, pairwise_diou, pairwise_diou_official
from kdcli.geometry.grid import Grid
from kdcli.geometry.spec import JsonSpec
from kdcli.structures import MAIN, VLR, Canvas, Entries

REGIONS = frozenset({"main", "vlr"})


@dataclass(frozen=True)
class RegionSpec(JsonSpec):
    """What the valuable localization region is: gamma * alpha <= metric < alpha."""

    vlr_metric: Literal["diou", "official"] = "diou"  # official: LD's repository, whose union is the anchor's area
    vlr_gamma: float = 0.25
    vlr_alpha: float | None = None  # None: ATSS's mean + deviation of the IoUs of a box's closest anchors
    vlr_topk: int = 9  # closest anchors a level for that statistic
    vlr_keep_positives: bool = True  # False (RetinaNet): positives of the assigner are not in the region

    def __post_init__(self) -> None:
        if self.vlr_metric not in ("diou", "official"):
            raise OptionError(f"vlr_metric '{self.vlr_metric}' is unknown; choose from diou, official")
        if not 0 <= self.vlr_gamma <= 1 or self.vlr_topk < 1:
            raise OptionError(f"{self}: vlr_gamma must be in 0..1 and vlr_topk >= 1")
        if self.vlr_alpha is not None and not 0 < self.vlr_alpha <= 1:
            raise OptionError(f"vlr_alpha {self.vlr_alpha}: must be an IoU above 0, at most 1, or none")


def vlr_weights(spec: RegionSpec, grid: Grid, canvas: Canvas, boxes: Tensor, content: tuple[int, int]) -> Tensor:
    """IoU of each anchor with the best box whose region it is in, [N] float64; 0 outside the region.

    ``boxes`` [G, 4] xyxy canvas pixels, ``content`` (height, width) in pixels. Does not look at positives.
    """
    weights = torch.zeros(grid.num_total(canvas), dtype=torch.float64)
    if len(boxes) == 0:
        return weights
    boxes = boxes.double()
    if spec.vlr_alpha is None:
        alpha = atss_candidates(grid, canvas, boxes, content, spec.vlr_topk).threshold
    else:
        alpha = torch.full((len(boxes),), spec.vlr_alpha, dtype=torch.float64)
    metric = pairwise_diou if spec.vlr_metric == "diou" else pairwise_diou_official
    usable = torch.nonzero(grid.valid_anchors(canvas, content)).squeeze(1)
    anchors = grid.anchors(canvas)[usable]
    best = torch.zeros(len(usable), dtype=torch.float64)
    size = max(1, CHUNK // len(usable))
    for start in range(0, len(boxes), size):
        part, high = boxes[start : start + size], alpha[start : start + size, None]
        value = metric(part, anchors)
        box, anchor = torch.nonzero((value < high) & (value >= spec.vlr_gamma * high), as_tuple=True)
        best = best.scatter_reduce(0, anchor, aligned_iou(part[box], anchors[anchor]), "amax")
    return weights.index_copy(0, usable, best)


def compute_entries(
    regions: frozenset[str],
    spec: RegionSpec,
    grid: Grid,
    canvas: Canvas,
    boxes: Tensor,
    assigned: Tensor,
    content: tuple[int, int],
) -> Entries:
    """Entries of one image for ``regions``, a subset of {"main", "vlr"}; sorted by index, each anchor once.

    ``boxes`` [G, 4] float32 xyxy canvas pixels, ``assigned`` [N] from ``assign``, ``content`` (height, width) pixels.
    Raises OptionError for another region.
    """
    if not regions <= REGIONS:
        raise OptionError(f"region '{min(regions - REGIONS)}' is not sparse; choose from main, vlr")
    total = grid.num_total(canvas)
    gt = torch.full((total,), -1)
    weight = torch.zeros(total, dtype=torch.float64)
    positive = assigned >= 0
    if "main" in regions:
        gt = torch.where(positive, assigned.long(), -1)
    if "vlr" in regions:
        weight = vlr_weights(spec, grid, canvas, boxes, content)
        if not spec.vlr_keep_positives:
            weight = weight.masked_fill(positive, 0.0)
    flag = (gt >= 0).to(torch.uint8) * MAIN | (weight > 0).to(torch.uint8) * VLR
    index = torch.nonzero(flag).squeeze(1)
    return Entries(
        index=index,
        flag=flag[index],
        gt=gt[index],
        weight=weight[index].float(),
        image=torch.zeros_like(index),
    )


def guard(boxes: Tensor, labels: Tensor, definition: str) -> bytes:
    """A 16-byte digest of what a row's entries depend on: boxes [G, 4], labels [G] and the region definition (JSON)."""
    digest = hashlib.blake2b(len(boxes).to_bytes(8, "little"), digest_size=16)
    digest.update(boxes.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes())
    digest.update(labels.detach().cpu().long().contiguous().numpy().astype("<i8").tobytes())
    digest.update(definition.encode())
    return digest.digest()
