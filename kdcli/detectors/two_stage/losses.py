"""The four losses of Faster R-CNN (arXiv 1506.01497) as pure functions, in float32: torchvision's, or mmdet's by recipe.

Each is a sum over the samples of all images, divided by their number over the global batch (``world_mean``), so that 1
and N processes agree. Batches without boxes give zeros that are part of the graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.detectors.two_stage.matching import RPN_SAMPLE, match_anchors, sample, seeds
from kdcli.detectors.two_stage.recipes import BOX_STDS, RPN_STDS, TwoStageRecipe
from kdcli.geometry.boxes import encode_deltas
from kdcli.structures import Targets
from kdcli.tensors import precise, world_mean


def _count(samples: Tensor, extra: int = 0) -> Tensor:
    """What a sum over ``samples`` (rows) is divided by."""
    return world_mean(torch.tensor(float(len(samples) + extra), device=samples.device), least=1)


def rpn_loss(logits: Tensor, deltas: Tensor, targets: Targets, recipe: TwoStageRecipe) -> dict[str, Tensor]:
    """``loss_rpn_cls`` (binary cross-entropy of 256 sampled anchors an image) and ``loss_rpn_box`` (smooth L1, or L1, of
    its positives), scalars. ``logits`` [B, N, 1], ``deltas`` [B, N, 4].
    """
    grid, missing = recipe.grid, 0
    anchors = grid.anchors(targets.canvas, torch.float32, logits.device)
    valid = targets.valid.repeat_interleave(grid.num_anchors, dim=1)
    rows, anchor_rows, goals, positives = [], [], [], []
    for image, (boxes, seed) in enumerate(zip(targets.boxes, seeds(targets), strict=True)):
        usable = torch.nonzero(valid[image]).squeeze(1)
        owner = match_anchors(anchors[usable], boxes, recipe.low_quality)
        drawn = sample(owner, RPN_SAMPLE, seed)
        index, owner = usable[drawn], owner[drawn]
        positive = owner >= 0
        rows.append(index + image * len(anchors))
        anchor_rows.append(index[positive])
        goals.append(boxes[owner[positive]])
        positives.append(positive)
        if recipe.count_missing:  # mmdet's SamplingResult: at least one of each kind
            missing += int(not positive.any()) + int(positive.all())
    row, positive = torch.cat(rows), torch.cat(positives)
    score = precise(logits).flatten()[row]
    shift = precise(deltas).flatten(0, 1)[row[positive]]
    goal = encode_deltas(anchors[torch.cat(anchor_rows)], torch.cat(goals), RPN_STDS)
    entropy = F.binary_cross_entropy_with_logits(score, positive.to(score), reduction="sum")
    distance = F.smooth_l1_loss(shift, goal, reduction="sum", beta=recipe.smooth_l1_beta)
    count = _count(row, missing)
    return {"loss_rpn_cls": entropy / count, "loss_rpn_box": distance / count}


def roi_loss(
    logits: Tensor, deltas: Tensor, proposals: Tensor, labels: Tensor, goals: Tensor, beta: float
) -> dict[str, Tensor]:
    """``loss_cls`` (cross-entropy over K + 1 classes) and ``loss_bbox`` (smooth L1 of the true class's deltas of the
    positives, L1 where ``beta`` is 0), scalars.

    Of S sampled proposals [S, 4]: ``logits`` [S, K + 1], background last, ``deltas`` [S, K, 4], ``labels`` [S] in 0..K,
    ``goals`` [S, 4] ground-truth boxes, xyxy canvas pixels.
    """
    positive = torch.nonzero(labels < deltas.shape[1]).squeeze(1)
    shift = precise(deltas)[positive, labels[positive]]
    goal = encode_deltas(proposals[positive], goals[positive], BOX_STDS)
    entropy = F.cross_entropy(precise(logits), labels, reduction="sum")
    distance = F.smooth_l1_loss(shift, goal, reduction="sum", beta=beta)
    count = _count(labels)
    return {"loss_cls": entropy / count, "loss_bbox": distance / count}
