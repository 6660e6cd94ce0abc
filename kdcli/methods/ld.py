"""LD: Localization Distillation for Dense Object Detection (CVPR 2022, arXiv 2102.12252).

The teacher's box-edge distributions teach the student where edges may lie: on the positives (main) and on the valuable
localization region around them (VLR), plus class distillation on the positives. All of it is read where ground truth
and geometry alone decide, so a sparse store holds everything exactly. Numbers are those of the official code
(HikariTJU/LD); where paper and code differ, the option says which is which.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdcli.geometry.grid import Grid
from kdcli.methods.base import Method, Pair
from kdcli.methods.divergence import kl_rows
from kdcli.structures import Batch
from kdcli.tensors import BOX_DISTRIBUTION, CLS_LOGITS, Need, Tensors, world_mean

BOXES = Need(BOX_DISTRIBUTION, "main+vlr")
CLASSES = Need(CLS_LOGITS, "main")

MAIN_DIVISOR = 4.0  # the code's avg_factor on the positives: the four edges
VLR_DIVISOR = 16.0  # and on the VLR
VLR_MASK_DIVISOR = 64.0  # with 0/1 weights instead of the IoU, whose mean is about 0.25: the same scale


class LD(Method):
    """Main LD, VLR LD and class KD.

    Options: ``weight``, ``temperature`` of both LD terms; ``vlr`` scales the VLR term (0 = main only); ``kd_weight``,
    ``kd_temperature`` of the class term; ``vlr_weight`` = ``iou`` (the code) or ``mask`` (the paper); ``batch_ref``: the
    official loss is a plain sum over the images of a process, tuned for 2 (3 for R18/R34): ours is scaled by
    batch_ref / images, so that the batch size does not change it. ``vlr_metric``, ``vlr_gamma``, ``vlr_alpha`` define
    the region: ``diou`` (the paper) or ``official`` (the code's overlap / anchor area), between gamma * alpha and alpha,
    where alpha is ATSS's mean + std unless a number is given.
    """

    title = "Localization Distillation for Dense Object Detection, CVPR 2022, arXiv 2102.12252"
    needs = (BOXES, CLASSES)
    region_options = ("vlr_metric", "vlr_gamma", "vlr_alpha")

    def __init__(
        self,
        pair: Pair,
        *,
        weight: float = 0.25,
        temperature: float = 10.0,
        vlr: float = 1.0,
        vlr_weight: Literal["iou", "mask"] = "iou",
        kd_weight: float = 10.0,
        kd_temperature: float = 2.0,
        batch_ref: float = 2.0,
        vlr_metric: Literal["diou", "official"] = "diou",
        vlr_gamma: float = 0.25,
        vlr_alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.canvas = pair.grid, pair.canvas
        self.weight, self.temperature = weight, temperature
        self.vlr, self.vlr_mask = vlr, vlr_weight == "mask"
        # a softmax over one class is constant: nothing to distil
        self.kd_weight = kd_weight if pair.student[CLS_LOGITS].dims[0] > 1 else 0.0
        self.kd_temperature = kd_temperature
        self.batch_ref = batch_ref

    def forward(self, student: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
        """``main``, ``vlr`` and ``kd``, without those whose weight is 0."""
        entries = batch.entries
        assert entries is not None
        union = entries.select("main+vlr")
        main = entries.select("main")[union]
        edges = kl_rows(student[BOXES.key], teacher[BOXES.key], self.temperature).sum(dim=-1)  # [M]
        images = world_mean(torch.as_tensor(float(len(batch.keys)), device=edges.device))
        scale = self.weight * self.batch_ref / images

        score = student[CLASSES.key].detach().sigmoid().amax(dim=-1)  # [M main]
        # both weights are 0 outside the VLR: summing over the union saves picking its rows
        iou, mask = entries.weight[union], entries.select("vlr")[union].float()
        vlr_weight, divisor = (mask, VLR_MASK_DIVISOR) if self.vlr_mask else (iou, VLR_DIVISOR)
        level = level_of(entries.index[entries.select("main")], self.grid, batch)
        classes = (student[CLASSES.key], teacher[CLASSES.key])
        terms = {}
        if self.weight:
            terms["main"] = scale * weighted_sum(edges[main], score, MAIN_DIVISOR)
        if self.weight and self.vlr:
            terms["vlr"] = scale * self.vlr * weighted_sum(edges, vlr_weight, divisor)
        if self.kd_weight:
            terms["kd"] = self.kd_weight * class_kd(*classes, level, len(self.grid.strides), self.kd_temperature)
        return terms

    def active(self, batch: Batch, part: str) -> bool:
        """``vlr`` needs a VLR, the others positives."""
        return batch.entries is not None and bool(batch.entries.select("vlr" if part == "vlr" else "main").any())

    def weight_option(self, part: str) -> str:
        """``kd`` has a weight of its own."""
        return "kd_weight" if part == "kd" else "weight"


def weighted_sum(edge_loss: Tensor, weight: Tensor, divisor: float) -> Tensor:
    """Sum of w_i * (KL over the four edges)_i / divisor: LD's own reduction, by no count of positives or images.

    ``edge_loss``: [M], summed over the edges; ``weight``: [M].
    """
    return (edge_loss * weight).sum() / divisor


def class_kd(student: Tensor, teacher: Tensor, level: Tensor, num_levels: int, temperature: float) -> Tensor:
    """Softmax KD over the class logits of positives: mean over the positives of each level, summed over levels.

    ``student``, ``teacher``: [M, K]; ``level``: [M]. Levels without positives give 0. The means are over the global
    batch.
    """
    rows = kl_rows(student, teacher, temperature)
    total = rows.new_zeros(num_levels).index_add(0, level, rows)
    count = rows.new_zeros(num_levels).index_add(0, level, torch.ones_like(rows))
    return (total / world_mean(count).clamp(min=1e-12)).sum()


def level_of(index: Tensor, grid: Grid, batch: Batch) -> Tensor:
    """Level [M] (0 = finest) of each anchor index [M]."""
    ends = torch.tensor(grid.level_sizes(batch.targets.canvas), device=index.device).cumsum(0)
    return torch.bucketize(index, ends, right=True)
