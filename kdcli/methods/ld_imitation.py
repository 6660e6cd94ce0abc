"""Feature imitation at chosen cells, an optional part of LD, in the form of LD's repository: the rows of its tables that
compare where to imitate.

``fitnet``: everywhere (arXiv 1412.6550). ``inside_gt``: at cells whose centre lies in a box. ``main``: at the positives.
``fine_grained``: near a box (arXiv 1906.03609). ``defeat``: inside and outside the boxes apart, the outside twice (DeFeat,
arXiv 2103.14475, as LD's repository means it). ``gi``: general instances (GID, arXiv 2103.02340).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from kdcli.geometry.grid import Grid
from kdcli.methods.divergence import squared_rows
from kdcli.structures import Batch
from kdcli.tensors import BOXES, CLS_LOGITS, FEATURES, Need, Region, Tensors, precise, world_mean, world_sum

Imitation = Literal["none", "fitnet", "inside_gt", "main", "fine_grained", "defeat", "gi"]
EVERYWHERE, INSIDE = Need(FEATURES, Region.ALL), Need(FEATURES, Region.INSIDE)
GENERAL = (EVERYWHERE, Need(CLS_LOGITS, Region.ALL), Need(BOXES, Region.ALL))
READS: dict[Imitation, tuple[Need, ...]] = {
    "none": (),
    "fitnet": (EVERYWHERE,),
    "inside_gt": (INSIDE,),
    "main": (Need(FEATURES, Region.MAIN),),
    "fine_grained": (Need(FEATURES, Region.FINE_GRAINED),),
    "defeat": (EVERYWHERE, INSIDE),  # a store does not hold the latter a second time
    "gi": GENERAL,
}
OUTSIDE_WEIGHT = 2.0  # of ``defeat``, beside 1 inside
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


def imitation_loss(
    kind: Imitation, adapter: nn.Module, student: Tensors, teacher: Tensors, batch: Batch, grid: Grid, gate: Tensor
) -> Tensor:
    """The imitation term of weight 1, a scalar: mean over the chosen cells and channels of each level, summed over levels.

    ``student``, ``teacher``: what READS names, by ``Need.key``; ``adapter``: from the student's channels to the teacher's;
    ``gate``: see ``level_mean_square``.
    """
    if kind == "defeat":
        return _inside_and_outside(adapter, student, teacher, batch, grid, gate)
    if kind in ("fitnet", "gi"):
        images, cells, level = (
            _valid_cells(batch, grid) if kind == "fitnet" else _instances(student, teacher, batch, grid)
        )
        ours, theirs = (side[EVERYWHERE.key][images, cells] for side in (student, teacher))
        return level_mean_square(adapter(ours), theirs, level, gate)
    assert batch.entries is not None
    (need,) = READS[kind]
    level = level_of(batch.entries.index[batch.entries.select(need.region)], grid, batch)
    return level_mean_square(adapter(student[need.key]), teacher[need.key], level, gate)


def level_of(index: Tensor, grid: Grid, batch: Batch) -> Tensor:
    """Level [M] (0 = finest) of each anchor index [M]."""
    ends = torch.tensor(grid.level_sizes(batch.targets.canvas), device=index.device).cumsum(0)
    return torch.bucketize(index, ends, right=True)


def _valid_cells(batch: Batch, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Image, cell and level of every valid cell of the batch, each [M]."""
    images, cells = torch.nonzero(batch.targets.valid, as_tuple=True)
    return images, cells, level_of(cells * grid.num_anchors, grid, batch)


def _inside_and_outside(
    adapter: nn.Module, student: Tensors, teacher: Tensors, batch: Batch, grid: Grid, gate: Tensor
) -> Tensor:
    """``defeat``: the cells inside the boxes, and the other valid ones, each by their own count.

    A level without a cell inside gives nothing, as in LD's repository. There the outside is compared with the teacher's
    features of the inside, of another number, so that it cannot run; here like is compared with like.
    """
    assert batch.entries is not None
    chosen = batch.entries.select(Region.INSIDE)
    index, level = batch.entries.index[chosen], level_of(batch.entries.index[chosen], grid, batch)
    gate = gate & levels_with_positives(level, len(gate))
    inner = level_mean_square(adapter(student[INSIDE.key]), teacher[INSIDE.key], level, gate)
    outside = batch.targets.valid.clone()
    outside[batch.entries.image[chosen], index // grid.num_anchors] = False
    place = torch.nonzero(outside, as_tuple=True)
    ours, theirs = (side[EVERYWHERE.key][place] for side in (student, teacher))
    outer = level_mean_square(adapter(ours), theirs, level_of(place[1] * grid.num_anchors, grid, batch), gate)
    return inner + OUTSIDE_WEIGHT * outer


def _instances(student: Tensors, teacher: Tensors, batch: Batch, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Image, cell and level of the general instances of each image and level, each [M]."""
    _, logits, boxes = (need.key for need in GENERAL)
    images, cells, levels = [], [], []
    valid = batch.targets.valid.repeat_interleave(grid.num_anchors, dim=1)
    for i in range(len(batch.keys)):
        start = 0
        for k, size in enumerate(grid.level_sizes(batch.targets.canvas)):
            anchors = start + torch.nonzero(valid[i, start : start + size]).squeeze(1)
            scores = student[logits][i, anchors].sigmoid(), teacher[logits][i, anchors].sigmoid()
            kept = anchors[general_instances(*scores, student[boxes][i, anchors], teacher[boxes][i, anchors])]
            images.append(torch.full_like(kept, i))
            levels.append(torch.full_like(kept, k))
            cells.append(kept // grid.num_anchors)
            start += size
    return torch.cat(images), torch.cat(cells), torch.cat(levels)
