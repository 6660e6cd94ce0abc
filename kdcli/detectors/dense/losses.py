"""Detection losses of the dense heads, as pure functions over a batch; all levels and images at once, in float32.

Formulas, weights and normalisers are mmdet 3.3.0's. Terms are already weighted. A batch without boxes gives zeros that
are part of the graph. Normalisers are over the global batch (``world_mean``), so that 1 and N processes agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from kdcli.geometry.boxes import (
    EPS,
    aligned_giou,
    aligned_iou,
    decode_deltas,
    decode_distances,
    encode_deltas,
    encode_distances,
)
from kdcli.geometry.derive import integral
from kdcli.geometry.grid import Grid
from kdcli.structures import IGNORED, Targets
from kdcli.tensors import precise, world_mean

QFL_BETA = 2.0
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
GIOU_WEIGHT, DFL_WEIGHT = 2.0, 0.25
DFL_MARGIN = 0.1  # a distance target stays this far below the last bin, so that a right-hand bin exists
Overlap = Callable[[Tensor, Tensor], Tensor]  # of box pairs [M, 4], predicted and true: what loss_bbox is 1 minus of
RETINANET_STDS = (1.0, 1.0, 1.0, 1.0)
ATSS_STDS = (0.1, 0.1, 0.2, 0.2)


@dataclass(frozen=True)
class Positives:
    """The M positives of a batch, in the order of (image, anchor), and what the class loss is divided by."""

    image: Tensor  # [M] int64
    anchor: Tensor  # [M] int64
    boxes: Tensor  # [M, 4] float32, their ground truth, xyxy canvas pixels
    labels: Tensor  # [M] int64
    counted: Tensor  # [B, N, 1] float32, 1 where the class loss reads: valid and not between two IoU thresholds
    average: Tensor  # scalar: sum over images of max(positives, 1), mean over processes


def gather_positives(targets: Targets) -> Positives:
    """Look up the ground truth of every positive of ``targets``."""
    assigned = targets.assigned
    image, anchor = torch.nonzero(assigned >= 0, as_tuple=True)
    counts = torch.tensor([0] + [len(boxes) for boxes in targets.boxes[:-1]], device=assigned.device)
    box = assigned[image, anchor] + counts.cumsum(0)[image]
    average = (assigned >= 0).sum(dim=1).clamp(min=1).sum().float()
    return Positives(
        image=image,
        anchor=anchor,
        boxes=torch.cat(targets.boxes)[box],
        labels=torch.cat(targets.labels)[box],
        counted=(assigned != IGNORED).float()[..., None],
        average=world_mean(average),
    )


def _in_strides(rows: Tensor, found: Positives, targets: Targets, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """(predicted boxes [M, 4], true boxes [M, 4], centres [M, 2]) of the positives, in strides, the unit of mmdet's eps.

    ``rows``: the positives' distances in strides [M, 4], or their edge logits [M, 4, E].
    """
    place = (targets.canvas, torch.float32, rows.device)
    stride = grid.anchor_strides(*place)[found.anchor, None]
    center = grid.centers(*place)[found.anchor // grid.num_anchors] / stride
    boxes = decode_distances(center, integral(rows) if rows.ndim == 3 else rows)
    return boxes, found.boxes / stride, center


def quality_focal(logits: Tensor, quality: Tensor, beta: float = QFL_BETA) -> Tensor:
    """Quality focal loss (arXiv 2006.04388) of each logit, for targets in 0..1 of the same shape.

    The modulating factor is part of the graph, as in mmdet.
    """
    factor = (quality - logits.sigmoid()).abs().pow(beta)
    return F.binary_cross_entropy_with_logits(logits, quality, reduction="none") * factor


def distribution_focal(distribution: Tensor, distance: Tensor) -> Tensor:
    """Distribution focal loss (arXiv 2006.04388): logits [..., E] against distances [...] in 0..E-1 strides: [...]."""
    log_p = F.log_softmax(distribution, dim=-1)
    left = distance.long()
    right_share = distance - left
    at_left = log_p.gather(-1, left[..., None]).squeeze(-1)
    at_right = log_p.gather(-1, left[..., None] + 1).squeeze(-1)
    return -(at_left * (1 - right_share) + at_right * right_share)


def gfl_loss(
    cls_logits: Tensor, box_distribution: Tensor, targets: Targets, grid: Grid, *, eps: float | None = None,
    overlap: Overlap = aligned_giou,
) -> dict[str, Tensor]:  # fmt: skip
    """GFL's loss_cls (QFL), loss_bbox (GIoU or another ``overlap``, x2) and loss_dfl (x0.25), scalars; arXiv 2006.04388.

    ``cls_logits`` [B, N, K], ``box_distribution`` [B, N, 4, E]. Box terms are weighted by the positive's best score
    and divided by the sum of those weights: clamped at 1 as in mmdet, or plus ``eps`` as in the repositories of LD
    (1e-6) and BCKD.
    """
    found = gather_positives(targets)
    logits = precise(cls_logits)
    rows = precise(box_distribution[found.image, found.anchor])  # [M, 4, E]
    boxes, goal, center = _in_strides(rows, found, targets, grid)

    quality = torch.zeros_like(logits)
    quality[found.image, found.anchor, found.labels] = aligned_iou(boxes.detach(), goal)
    loss_cls = (quality_focal(logits, quality) * found.counted).sum() / found.average

    weight = logits.detach()[found.image, found.anchor].amax(dim=-1).sigmoid()
    total = world_mean(weight.sum(), least=1) if eps is None else world_mean(weight.sum()) + eps
    last = rows.shape[-1] - 1
    distance = encode_distances(center, goal).clamp(0, last - DFL_MARGIN)
    loss_bbox = ((1 - overlap(boxes, goal)) * weight).sum() / total
    loss_dfl = (distribution_focal(rows, distance).mean(dim=-1) * weight).sum() / total
    return {"loss_cls": loss_cls, "loss_bbox": GIOU_WEIGHT * loss_bbox, "loss_dfl": DFL_WEIGHT * loss_dfl}


def _focal_cls(logits: Tensor, found: Positives, average: Tensor) -> Tensor:
    """Focal loss (arXiv 1708.02002) of a batch's class logits [B, N, K], divided by ``average``, a scalar."""
    hot = torch.zeros_like(logits)
    hot[found.image, found.anchor, found.labels] = 1.0
    loss: Tensor = sigmoid_focal_loss(logits, hot, alpha=FOCAL_ALPHA, gamma=FOCAL_GAMMA, reduction="none")
    return (loss * found.counted).sum() / average


def retinanet_loss(
    cls_logits: Tensor, box: Tensor, targets: Targets, grid: Grid, *, overlap: Overlap = aligned_giou
) -> dict[str, Tensor]:
    """RetinaNet's loss_cls (focal) and loss_bbox (L1 of the deltas), scalars; arXiv 1708.02002.

    ``cls_logits`` [B, N, K], ``box`` [B, N, 4] deltas. With edge logits [B, N, 4, E], loss_bbox is the ``overlap`` (x2) of the
    decoded boxes, without weights, divided by the positives: LD's repository (arXiv 2102.12252).
    """
    found = gather_positives(targets)
    rows = precise(box[found.image, found.anchor])
    loss_cls = _focal_cls(precise(cls_logits), found, found.average)
    if rows.ndim == 3:
        boxes, goal, _ = _in_strides(rows, found, targets, grid)
        return {"loss_cls": loss_cls, "loss_bbox": GIOU_WEIGHT * (1 - overlap(boxes, goal)).sum() / found.average}
    anchors = grid.anchors(targets.canvas, torch.float32, cls_logits.device)[found.anchor]
    error = (rows - encode_deltas(anchors, found.boxes, RETINANET_STDS)).abs()
    return {"loss_cls": loss_cls, "loss_bbox": error.sum() / found.average}


def centerness_target(centers: Tensor, boxes: Tensor) -> Tensor:
    """How central the points [M, 2] lie in their boxes [M, 4], 0..1: [M] (arXiv 1904.01355)."""
    left, top, right, bottom = encode_distances(centers, boxes).unbind(dim=-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (horizontal * vertical).sqrt()


def _centerness(logits: Tensor, found: Positives, targets: Targets, grid: Grid) -> tuple[Tensor, Tensor]:
    """(target [M], cross-entropy summed over the positives, a scalar) of centerness logits [B, N, 1]."""
    rows = precise(logits[found.image, found.anchor, 0])
    # of the logits' dtype: float32 goals would sum to another last digit on each number of processes, also in float64
    centers = grid.centers(targets.canvas, rows.dtype, logits.device)[found.anchor // grid.num_anchors]
    goal = centerness_target(centers, found.boxes.to(rows.dtype))
    return goal, F.binary_cross_entropy_with_logits(rows, goal, reduction="sum")


def atss_loss(
    cls_logits: Tensor,
    box: Tensor,
    centerness: Tensor,
    targets: Targets,
    grid: Grid,
    *,
    overlap: Overlap = aligned_giou,
) -> dict[str, Tensor]:
    """ATSS's loss_cls (focal), loss_bbox (1 - ``overlap``, x2, weighted by centerness) and loss_centerness, scalars.

    ``cls_logits`` [B, N, K], ``box`` [B, N, 4] deltas (stds .1 .1 .2 .2) or [B, N, 4, E] edge logits, ``centerness``
    [B, N, 1] logits; arXiv 1912.02424.
    """
    found = gather_positives(targets)
    goal, entropy = _centerness(centerness, found, targets, grid)
    rows, true = precise(box[found.image, found.anchor]), found.boxes
    if rows.ndim == 3:
        boxes, true, _ = _in_strides(rows, found, targets, grid)
    else:
        anchors = grid.anchors(targets.canvas, torch.float32, cls_logits.device)[found.anchor]
        boxes = decode_deltas(anchors, rows, ATSS_STDS)
    loss_bbox = ((1 - overlap(boxes, true)) * goal).sum() / world_mean(goal.sum(), least=1)
    return {
        "loss_cls": _focal_cls(precise(cls_logits), found, found.average),
        "loss_bbox": GIOU_WEIGHT * loss_bbox,
        "loss_centerness": entropy / found.average,
    }


def fcos_loss(
    cls_logits: Tensor, box: Tensor, centerness: Tensor, targets: Targets, grid: Grid, *, log_iou: bool = False,
    overlap: Overlap = aligned_giou,
) -> dict[str, Tensor]:  # fmt: skip
    """FCOS's loss_cls (focal), loss_bbox (weighted by centerness) and loss_centerness, scalars; arXiv 1904.01355.

    ``cls_logits`` [B, N, K], ``box`` [B, N, 4] distances in strides or [B, N, 4, E] edge logits, ``centerness``
    [B, N, 1] logits. loss_bbox is 1 - ``overlap``; with ``log_iou`` -log IoU, as in the paper. Divided by the positives of the
    whole batch, at least 1, where the anchor heads count 1 for each image without.
    """
    found = gather_positives(targets)
    average = world_mean(found.counted.new_tensor(float(len(found.anchor))), least=1)
    goal, entropy = _centerness(centerness, found, targets, grid)
    boxes, true, _ = _in_strides(precise(box[found.image, found.anchor]), found, targets, grid)
    error = -aligned_iou(boxes, true).clamp(min=EPS).log() if log_iou else 1 - overlap(boxes, true)
    return {
        "loss_cls": _focal_cls(precise(cls_logits), found, average),
        "loss_bbox": (error * goal).sum() / world_mean(goal.sum(), least=EPS),
        "loss_centerness": entropy / average,
    }
