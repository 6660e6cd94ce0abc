"""Which ground-truth box an anchor or a proposal is trained for, and the random sample of them that the losses read.

torchvision's rules or mmdet's. Anchors of cells outside the valid area are read by no loss, as in mmdet. Under torchvision's
rules a box that overlaps several anchors equally takes all of them within a tolerance, where torchvision compares float32
numbers for equality and so takes those that happen to be rounded alike.

The sample depends on ``Targets.draws`` alone, a seed for each image, so that 1 and N processes draw alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdcli.detectors.two_stage.recipes import TORCHVISION_LOW_QUALITY, LowQuality
from kdcli.geometry.assign import CHUNK
from kdcli.geometry.boxes import pairwise_iou
from kdcli.structures import BACKGROUND, IGNORED, Targets

RPN_POSITIVE, RPN_NEGATIVE = 0.7, 0.3  # IoU
ROI_POSITIVE = 0.5  # below it: background


@dataclass(frozen=True)
class SampleRule:
    """At most ``size`` an image, of which at most the share ``positive`` are positives. use: sets its draws apart."""

    size: int
    positive: float
    use: int


RPN_SAMPLE = SampleRule(256, 0.5, use=1)
ROI_SAMPLE = SampleRule(512, 0.25, use=2)
DISTILLATION_SAMPLE = SampleRule(512, 0.25, use=3)  # DeFeat: of the teacher's proposals


def match_anchors(anchors: Tensor, boxes: Tensor, rule: LowQuality = TORCHVISION_LOW_QUALITY) -> Tensor:
    """For each anchor [N, 4] the index of its box ([G, 4], xyxy canvas pixels), BACKGROUND or IGNORED: [N] int64.

    Positive: IoU >= 0.7, or none of the box's IoUs is higher (several anchors in a tie), where ``rule`` says for which
    box. Background: IoU < 0.3. torchvision's Matcher with low-quality matches; mmdet 3.3.0, as its MaxIoUAssigner does.
    """
    best = anchors.new_zeros(len(anchors))
    owner = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    claimant = torch.full_like(owner, BACKGROUND)  # the last box that has no higher IoU
    size = max(1, CHUNK // len(anchors))
    for start in range(0, len(boxes), size):
        iou = pairwise_iou(boxes[start : start + size], anchors)
        highest, index = iou.max(dim=0)
        owner = torch.where(highest > best, index + start, owner)
        best = torch.maximum(best, highest)
        peak = iou.amax(dim=1, keepdim=True)
        tops = (iou >= peak - rule.tie) & (peak > 0) & (peak >= rule.min_iou)
        numbers = torch.arange(start, start + len(iou), device=iou.device)[:, None]
        claimant = torch.maximum(claimant, torch.where(tops, numbers, BACKGROUND).amax(dim=0))
    found = torch.where(best >= RPN_POSITIVE, owner, IGNORED).masked_fill(best < RPN_NEGATIVE, BACKGROUND)
    return torch.where(claimant == BACKGROUND, found, claimant if rule.claimed else owner)


def match_proposals(proposals: Tensor, boxes: Tensor) -> Tensor:
    """For each proposal [R, 4] the index of the box [G, 4] it overlaps most, BACKGROUND below an IoU of 0.5: [R] int64."""
    if len(boxes) == 0:
        return torch.full((len(proposals),), BACKGROUND, device=proposals.device)
    best, owner = pairwise_iou(boxes, proposals).max(dim=0)
    return owner.masked_fill(best < ROI_POSITIVE, BACKGROUND)


def sample(owner: Tensor, rule: SampleRule, seed: int) -> Tensor:
    """Indices into ``owner`` [n] (box index, BACKGROUND or IGNORED) of a random sample: [S] int64, ascending.

    Positives first up to their share, then background up to the size. Drawn on the CPU, from ``seed`` alone.
    """
    generator = torch.Generator().manual_seed(seed + rule.use)
    chosen, room = [], int(rule.size * rule.positive)
    for kind in (owner >= 0, owner == BACKGROUND):
        members = torch.nonzero(kind).squeeze(1)
        order = torch.randperm(len(members), generator=generator)[:room].to(owner.device)
        chosen.append(members[order])
        room = rule.size - len(order)
    return torch.cat(chosen).sort().values


def seeds(targets: Targets) -> list[int]:
    """A seed for each image of ``targets``; the same for all where there are no draws (a validation loss)."""
    return [0] * len(targets.boxes) if targets.draws is None else [int(seed) for seed in targets.draws.tolist()]


def sample_proposals(
    proposals: list[Tensor], targets: Targets, num_classes: int, rule: SampleRule, *, own_boxes: bool = False
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Match and sample the ``proposals`` of each image ([R, 4], whose last rows are its ground-truth boxes).
    ``own_boxes``: see TwoStageRecipe.

    Returns for each image the indices into its list [S], their labels [S] (``num_classes`` = background) and their
    ground-truth boxes [S, 4] (zeros for background).
    """
    indices, labels, goals = [], [], []
    for listed, boxes, classes, seed in zip(proposals, targets.boxes, targets.labels, seeds(targets), strict=True):
        owner = match_proposals(listed, boxes)
        if own_boxes:
            owner[len(owner) - len(boxes) :] = torch.arange(len(boxes), device=owner.device)
        index = sample(owner, rule, seed)
        owner = owner[index]  # BACKGROUND, -1, reads the row that is put behind the boxes
        indices.append(index)
        labels.append(torch.cat([classes, classes.new_tensor([num_classes])])[owner])
        goals.append(torch.cat([boxes, boxes.new_zeros(1, 4)])[owner])
    return indices, labels, goals
