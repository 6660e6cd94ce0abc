"""From the RPN's outputs to proposals: the boxes that the RoI head looks at."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from kdcli.detectors.two_stage.recipes import RPN_STDS, ProposalRule, TwoStageRecipe
from kdcli.geometry.boxes import decode_deltas
from kdcli.structures import Canvas

NMS_IOU = 0.7


def clip(boxes: Tensor, content: Tensor) -> Tensor:
    """``boxes`` [..., 4] within ``content`` [2] (height, width), in canvas pixels."""
    return boxes.clamp(min=0).minimum(content.flip(0).repeat(2).to(boxes))


@torch.no_grad()
def find_proposals(
    logits: Tensor, deltas: Tensor, recipe: TwoStageRecipe, content: Tensor, canvas: Canvas, rule: ProposalRule
) -> list[Tensor]:
    """Proposals [R <= rule.after, 4] of each image, best first, xyxy canvas pixels clipped to the content; no gradient.

    ``logits`` [B, N, 1], ``deltas`` [B, N, 4], ``content`` [B, 2] (height, width). NMS runs within each level, as in
    torchvision and mmdet; anchors outside the valid area take part, as those of padding do there.
    """
    grid = recipe.grid
    logits, deltas = logits.float().squeeze(-1), deltas.float()
    anchors = grid.anchors(canvas, torch.float32, logits.device)
    picked, levels, start = [], [], 0
    for level, size in enumerate(grid.level_sizes(canvas)):
        best = logits[:, start : start + size].topk(min(rule.before, size), dim=1).indices + start
        picked.append(best)
        levels.append(torch.full_like(best[0], level))
        start += size
    index, level_of = torch.cat(picked, dim=1), torch.cat(levels)
    found = []
    for image, chosen in enumerate(index):
        boxes = clip(decode_deltas(anchors[chosen], deltas[image, chosen], RPN_STDS), content[image])
        scores = logits[image, chosen].sigmoid()
        sides = boxes[:, 2:] - boxes[:, :2]
        real = ((sides >= recipe.proposal_side) & (sides > 0)).all(dim=1)
        boxes, scores, of_level = boxes[real], scores[real], level_of[real]
        found.append(boxes[batched_nms(boxes, scores, of_level, NMS_IOU)[: rule.after]])
    return found
