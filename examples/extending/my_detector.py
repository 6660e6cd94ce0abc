"""A detector in one file: GFL's network, five candidates a level instead of nine, and varifocal classification.

The varifocal loss (VarifocalNet, arXiv 2008.13367, eq. 2) asks a positive's class score for the IoU of its box, as GFL
does, but weighs a positive by that IoU and takes down only negatives. VarifocalNet's star-shaped convolution and its
second box branch are left out, so this is not VarifocalNet.

    kdcli --plugin examples/extending/my_detector.py train --model varifocal_resnet18 ...
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.detectors.dense.losses import gather_positives
from kdcli.detectors.dense.recipes import GFL
from kdcli.geometry.assign import AssignerSpec
from kdcli.geometry.boxes import aligned_giou, aligned_iou
from kdcli.geometry.derive import decode_distribution
from kdcli.geometry.grid import Grid
from kdcli.structures import Targets
from kdcli.tensors import BOX_DISTRIBUTION, CLS_LOGITS, Tensors, precise, world_mean

ALPHA, GAMMA = 0.75, 2.0  # of the negatives
GIOU_WEIGHT = 2.0


def varifocal(logits: Tensor, quality: Tensor) -> Tensor:
    """The varifocal loss of each logit, for targets of the same shape: the IoU at a positive's class, 0 elsewhere."""
    weight = torch.where(quality > 0, quality, ALPHA * logits.sigmoid().pow(GAMMA))
    return F.binary_cross_entropy_with_logits(logits, quality, reduction="none") * weight


def loss(outputs: Tensors, targets: Targets, grid: Grid) -> dict[str, Tensor]:
    """loss_cls (varifocal) and loss_bbox (GIoU, x2, weighted by the IoU), scalars over the global batch.

    Reads ``cls_logits`` [B, N, K] and ``box_distribution`` [B, N, 4, E]. A batch without boxes gives a loss_bbox of 0
    that is still part of the graph, since a sum over no rows is.
    """
    found = gather_positives(targets)  # the M positives; `average`: their number, over the processes
    place = (targets.canvas, torch.float32, found.anchor.device)
    centers = grid.centers(*place)[found.anchor // grid.num_anchors]
    strides = grid.anchor_strides(*place)[found.anchor]
    rows = precise(outputs[BOX_DISTRIBUTION][found.image, found.anchor])  # [M, 4, E]
    boxes = decode_distribution(rows, centers, strides)  # canvas pixels
    iou = aligned_iou(boxes.detach(), found.boxes)

    logits = precise(outputs[CLS_LOGITS])
    quality = torch.zeros_like(logits)
    quality[found.image, found.anchor, found.labels] = iou
    loss_cls = (varifocal(logits, quality) * found.counted).sum() / found.average  # `counted`: not in the padding

    total = world_mean(iou.sum()).clamp(min=1)
    loss_bbox = ((1 - aligned_giou(boxes, found.boxes)) * iou).sum() / total
    return {"loss_cls": loss_cls, "loss_bbox": GIOU_WEIGHT * loss_bbox}


VARIFOCAL = replace(GFL, name="varifocal", assigner=AssignerSpec(kind="atss", topk=5), loss=loss)

DETECTORS = {"varifocal": VARIFOCAL}
