"""DRKD: Dual Relation Knowledge Distillation for Object Detection (IJCAI 2023, arXiv 2302.05637).

Three imitations: of the neck maps after global reasoning (pixel relations, PR), of the ground-truth boxes' features after
attention among them (instance relations, IR), and of those features themselves (INS). The modules on the teacher's side
are trained too, and left behind at export; a store therefore holds their inputs. Numbers and forms are those of the
authors' snapshot (nizhenliang/Dual-Relation-Knowledge-Distillation); docs/methods/drkd.md tells where it cannot run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdcli.geometry.rois import ROI_LEVELS, ROI_SIZE, gt_rois
from kdcli.methods.base import APPROXIMATION, Method, Pair
from kdcli.methods.glore import GloRe
from kdcli.methods.maps import MAPS, channels, image_of, mean_images
from kdcli.methods.reduce import safe_sqrt, world_sum_grad
from kdcli.methods.relation import Filter, RelationBlock
from kdcli.structures import Batch
from kdcli.tensors import GT_ROIS, Need, Region, Tensors, precise, spec_of, world_size

ROIS = Need(GT_ROIS, Region.GT)

FINE_NODES, COARSE_NODES = 64, 256  # of GloRe, on the two finest levels and on the others
FINE_LEVELS = 2
ROI_CELLS = ROI_SIZE**2


class DRKD(Method):
    """Pixel relations, instance relations and instance features.

    Options: ``pr_weight``, ``ir_weight``, ``ins_weight``; ``relation_filter``: what multiplies the attention logits of
    IR: ``gate`` (learned; ours, since the paper's filter is not in the code), ``none``, or ``random_official`` (the
    code's: random numbers, never learned); ``batch_ref``: the official losses are norms over the two images of a
    process: PR is scaled by sqrt(batch_ref / images), the others by batch_ref / images, so that the batch size does not
    change them. The teacher's features of the boxes are computed from its neck maps, which PR needs anyway.
    """

    title = "Dual Relation Knowledge Distillation for Object Detection, IJCAI 2023, arXiv 2302.05637"
    evidence = "paper's abstract, the authors' incomplete snapshot; relation gate and weights off two nets are ours"
    offline = "exact, dense"
    needs = (MAPS,)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "faster_rcnn": {"pr_weight": 1e-3, "ir_weight": 4e-3, "ins_weight": 2.4e-3}
    }
    index_aligned = False

    def __init__(
        self,
        pair: Pair,
        *,
        pr_weight: float = 4e-3,
        ir_weight: float = 5e-3,
        ins_weight: float = 6e-3,
        relation_filter: Filter = "gate",
        batch_ref: float = 2.0,
    ) -> None:
        super().__init__()
        self.grid, self.pr_weight, self.batch_ref = pair.grid, pr_weight, batch_ref
        # a module without a term would be a parameter without a gradient, which DDP refuses
        self.pixels = PixelRelation(*channels(pair), len(pair.grid.strides)) if pr_weight else None
        self.instances = InstanceRelation(*channels(pair), ir_weight, ins_weight, relation_filter)

    def forward(self, student: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
        """``pr``, ``ir`` and ``ins``, without those whose weight is 0."""
        inside = batch.targets.valid[..., None]
        # both nets lose what lies outside the image: a store has zeros there, and the student shall not learn padding
        ours = torch.where(inside, precise(student[MAPS.key]), 0.0)
        theirs = torch.where(inside, precise(teacher[MAPS.key].detach()), 0.0)
        images = mean_images(batch)
        terms = {}
        if self.pixels is not None:
            split = (self.grid.split_levels(v, batch.targets.canvas) for v in (ours, theirs, batch.targets.valid))
            scale = (self.batch_ref / (images * world_size())).sqrt()
            terms["pr"] = self.pr_weight * scale * self.pixels(*split)
        if self.instances.weights:
            place = batch.targets.boxes, self.grid, batch.targets.canvas
            with torch.no_grad():
                target = gt_rois(theirs, *place)
            terms |= self.instances(gt_rois(ours, *place), target, batch, self.batch_ref / images)
        return terms

    def weight_option(self, part: str) -> str:
        """Each term has a weight of its own."""
        return f"{part}_weight"

    def active(self, batch: Batch, part: str) -> bool:
        """``ir`` and ``ins`` need a box."""
        return part == "pr" or any(len(b) for b in batch.targets.boxes)


class DRKDLite(Method):
    """DRKD without its pixel relations: what a small store can hold exactly. An approximation of DRKD with its own name.

    Options: ``ir_weight``, ``ins_weight``, ``relation_filter`` and ``batch_ref`` as in ``drkd``.
    """

    title = "Dual Relation Knowledge Distillation without pixel relations, after IJCAI 2023, arXiv 2302.05637"
    evidence = "our decision: DRKD without its pixel relations"
    offline = APPROXIMATION
    needs = (ROIS,)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"faster_rcnn": {"ir_weight": 4e-3, "ins_weight": 2.4e-3}}
    index_aligned = False

    def __init__(
        self,
        pair: Pair,
        *,
        ir_weight: float = 5e-3,
        ins_weight: float = 6e-3,
        relation_filter: Filter = "gate",
        batch_ref: float = 2.0,
    ) -> None:
        super().__init__()
        self.batch_ref = batch_ref
        ours, theirs = (spec_of(GT_ROIS, side).dims[1] for side in (pair.student, pair.teacher))
        self.instances = InstanceRelation(ours, theirs, ir_weight, ins_weight, relation_filter)

    def forward(self, student: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
        """``ir`` and ``ins``, without those whose weight is 0."""
        scale = self.batch_ref / mean_images(batch)
        terms: dict[str, Tensor] = self.instances(student[ROIS.key], teacher[ROIS.key], batch, scale)
        return terms

    def weight_option(self, part: str) -> str:
        """Each term has a weight of its own."""
        return f"{part}_weight"

    def active(self, batch: Batch, part: str) -> bool:
        """Both need a box."""
        return any(len(b) for b in batch.targets.boxes)


class PixelRelation(nn.Module):
    """GloRe on every level of both nets, and a 1x1 convolution from the student's result to the teacher's."""

    def __init__(self, ours: int, theirs: int, levels: int) -> None:
        super().__init__()
        nodes = [FINE_NODES if i < FINE_LEVELS else COARSE_NODES for i in range(levels)]
        self.student = nn.ModuleList([GloRe(ours, n) for n in nodes])
        self.teacher = nn.ModuleList([GloRe(theirs, n) for n in nodes])
        self.adapters = nn.ModuleList([nn.Linear(ours, theirs) for _ in nodes])

    def forward(self, student: list[Tensor], teacher: list[Tensor], valid: list[Tensor]) -> Tensor:
        """Norm of the difference over the global batch, summed over levels. Levels [B, cells, C], ``valid`` [B, cells].

        GloRe reads the whole map, the norm the valid cells.
        """
        squares = []
        for i, (s, t, v) in enumerate(zip(student, teacher, valid, strict=True)):
            difference = self.adapters[i](self.student[i](s)) - self.teacher[i](t)
            squares.append((difference.square() * v[..., None]).sum())
        return batch_norms(torch.stack(squares))


class InstanceRelation(nn.Module):
    """IR and INS on the boxes' features of the two finest levels; separate parameters per level and per side."""

    def __init__(self, ours: int, theirs: int, ir_weight: float, ins_weight: float, relation_filter: Filter) -> None:
        super().__init__()
        self.weights = {n: w for n, w in (("ir", ir_weight), ("ins", ins_weight)) if w}
        levels = range(ROI_LEVELS)
        self.student, self.teacher, self.adapters = nn.ModuleList(), nn.ModuleList(), nn.ModuleDict()
        if ir_weight:
            self.student.extend(RelationBlock(ROI_CELLS * ours, relation_filter, 2 * i) for i in levels)
            self.teacher.extend(RelationBlock(ROI_CELLS * theirs, relation_filter, 2 * i + 1) for i in levels)
        for name in self.weights:
            self.adapters.update({f"{name}{i}": nn.Linear(ours, theirs) for i in levels})

    def forward(self, student: Tensor, teacher: Tensor, batch: Batch, scale: Tensor) -> dict[str, Tensor]:
        """``ir`` and ``ins`` of features [S, 2, C, 3, 3] of the batch's boxes, times ``scale``."""
        ours, theirs = precise(student).flatten(3), precise(teacher.detach()).flatten(3)  # [S, 2, C, 9]
        counts, draws = [len(b) for b in batch.targets.boxes], batch.targets.draws
        totals: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        for i in range(ROI_LEVELS):
            pairs = {"ins": (ours[:, i], theirs[:, i])}
            if "ir" in self.weights:
                sides = (self.student[i], ours[:, i]), (self.teacher[i], theirs[:, i])
                s, t = (block(side.flatten(1), counts, draws).view_as(side) for block, side in sides)
                pairs["ir"] = s, t
            for name in self.weights:
                s, t = pairs[name]
                difference = self.adapters[f"{name}{i}"](s.mT) - t.mT
                totals[name].append(image_norms(difference.flatten(1), counts))
        return {n: self.weights[n] * scale * torch.stack(totals[n]).sum() for n in self.weights}


def batch_norms(squares: Tensor) -> Tensor:
    """Sum over levels of the unsquared Frobenius norm over the global batch. ``squares`` [L]: sums of one process."""
    return safe_sqrt(world_sum_grad(squares)).sum()


def image_norms(difference: Tensor, counts: list[int]) -> Tensor:
    """Sum over images of the unsquared Frobenius norm of their rows of ``difference`` [S, D]; 0 for one without boxes."""
    squares = difference.square().sum(dim=1)
    total = squares.new_zeros(len(counts)).index_add(0, image_of(counts, squares.device), squares)
    return safe_sqrt(total).sum()
