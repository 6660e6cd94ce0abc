"""Feature imitation at chosen cells, an optional part of LD: fine-grained (arXiv 1906.03609) or general instances
(GID, arXiv 2103.02340), in the form of LD's repository.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

from kdcli.methods.divergence import squared_rows
from kdcli.tensors import precise, world_mean, world_sum

GI_NMS = 0.3  # general instances: IoU of the suppression, and how many a level keeps
GI_KEPT = 10


def level_mean_square(student: Tensor, teacher: Tensor, level: Tensor, gate: Tensor) -> Tensor:
    """Mean squared difference over the cells and channels of each level, summed over the levels where ``gate`` is set.

    ``student``, ``teacher``: [M, C] at the chosen cells; ``level``: [M]; ``gate``: [L] bool. A level without chosen
    cells gives 0. The means are over the global batch.
    """
    rows = squared_rows(precise(student), teacher)
    total = rows.new_zeros(len(gate)).index_add(0, level, rows)
    count = rows.new_zeros(len(gate)).index_add(0, level, torch.ones_like(rows))
    share: Tensor = total / world_mean(count).clamp(min=1e-12) * gate
    return share.sum()


def levels_with_positives(level: Tensor, num_levels: int) -> Tensor:
    """[L] bool: which levels have a positive somewhere in the global batch; ``level``: [M] of the positives here."""
    ones = torch.ones_like(level, dtype=torch.float32)
    return world_sum(torch.zeros(num_levels, device=level.device).index_add(0, level, ones)) > 0


@torch.no_grad()
def general_instances(
    student_scores: Tensor, teacher_scores: Tensor, student_boxes: Tensor, teacher_boxes: Tensor
) -> Tensor:
    """Where student and teacher disagree most: indices [<= 10] of one level's anchors, most disputed first.

    Scores [n, K] in 0..1, boxes [n, 4]. An anchor's rank is its largest difference of a class score; its box is that of
    whichever net scores that class higher; boxes suppress each other at IoU 0.3. LD's repository does this over all
    images of a batch at once, so that boxes of different images suppress each other; LD calls it image by image.
    """
    difference = precise(teacher_scores - student_scores)
    dispute, label = difference.abs().max(dim=1)
    teacher_leads = difference.gather(1, label[:, None]) >= 0
    boxes = torch.where(teacher_leads, precise(teacher_boxes), precise(student_boxes))
    kept: Tensor = nms(boxes, dispute, GI_NMS)
    return kept[:GI_KEPT]
