"""LD: Localization Distillation for Dense Object Detection (CVPR 2022, arXiv 2102.12252).

The teacher's box-edge distributions teach the student where edges may lie: on the positives (main) and on the valuable
localization region around them (VLR), plus class distillation on the positives. All of it is read where ground truth
and geometry alone decide, so a sparse store holds everything exactly. Numbers are those of the official code
(HikariTJU/LD); where paper and code differ, the option says which is which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kdcli.errors import OptionError
from kdcli.methods.base import Method, Pair, method_options
from kdcli.methods.divergence import kl_rows
from kdcli.methods.ld_imitation import READS, Imitation, imitation_loss, level_of, levels_with_positives
from kdcli.methods.maps import mean_images
from kdcli.structures import Batch, Entries
from kdcli.tensors import BOX_DISTRIBUTION, CLS_LOGITS, FEATURES, MAIN_OR_VLR, Need, Region, Tensors, world_mean

EDGES = Need(BOX_DISTRIBUTION, MAIN_OR_VLR)
CLASSES = Need(CLS_LOGITS, Region.MAIN)
VLR_CLASSES = Need(CLS_LOGITS, Region.VLR)
STUDENT_SCORES = Need(CLS_LOGITS, MAIN_OR_VLR)  # what the VLR is weighed by on FCOS

PUBLISHED_CLASSES = 80  # COCO, for which the weights were chosen
MAIN_DIVISOR = 4.0  # the code's avg_factor on the positives: the four edges
VLR_DIVISOR = 16.0  # and on the VLR
VLR_MASK_DIVISOR = 64.0  # with 0/1 weights instead of the IoU, whose mean is about 0.25: the same scale


class LD(Method):
    """Main LD, VLR LD, class KD and, optionally, class KD on the VLR and feature imitation.

    Options: ``weight``, ``temperature`` of both LD terms; ``vlr`` scales the VLR term (0 = main only); ``kd_weight``,
    ``kd_temperature`` of the class term; ``vlr_kd_weight`` of the same term on the VLR; ``vlr_weight`` = ``iou`` (the
    code), ``mask`` (the paper) or ``score`` (the student's own, the code on FCOS); ``joint`` takes one softmax over the
    four edges' bins together, as the code does on RetinaNet (its weight is 5 then); ``batch_ref``: the official loss is a
    plain sum over the images of a process, tuned for 2 (3 for R18/R34): ours is scaled by batch_ref / images, so that the
    batch size does not change it.
    ``vlr_metric``, ``vlr_gamma``, ``vlr_alpha`` define the region: ``diou`` (the paper), ``official`` (the code's overlap
    / anchor area) or ``inside`` (background inside a box: FCOS has no anchors), between gamma * alpha and alpha, where
    alpha is ATSS's mean + std unless a number is given. ``imitation``: where features are imitated (``ld_imitation.py``),
    with ``imitation_weight``; ``gi``, ``fitnet`` and ``defeat`` need a dense store.
    """

    title = "Localization Distillation for Dense Object Detection, CVPR 2022, arXiv 2102.12252"
    evidence = "paper's abstract, official code; on RetinaNet one softmax an edge, and its weight, are ours"
    offline = "exact"
    needs: tuple[Need, ...] = (EDGES, CLASSES)
    reads_targets = False  # the entries say what is positive
    region_options = ("vlr_metric", "vlr_gamma", "vlr_alpha")
    # the VLR weight of the code, as a share of ours: .15 / 4 against 1 / 16 on ATSS, .25 / 4 on FCOS, .03 / 4 on RetinaNet,
    # whose .3125 is 5 / 16: per edge what 5 is for the joint softmax
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "atss": {"vlr": 0.6},
        "fcos": {"vlr_weight": "score", "vlr_metric": "inside"},
        "retinanet": {"weight": 0.3125, "vlr": 0.12, "kd_temperature": 8.0},
    }

    def __init__(
        self,
        pair: Pair,
        *,
        weight: float = 0.25,
        temperature: float = 10.0,
        vlr: float = 1.0,
        vlr_weight: Literal["iou", "mask", "score"] = "iou",
        kd_weight: float = 10.0,
        kd_temperature: float = 2.0,
        vlr_kd_weight: float = 0.0,
        joint: bool = False,
        batch_ref: float = 2.0,
        vlr_metric: Literal["diou", "official", "inside"] = "diou",
        vlr_gamma: float = 0.25,
        vlr_alpha: float | None = None,
        imitation: Imitation = "none",
        imitation_weight: float = 2.0,
    ) -> None:
        super().__init__()
        if not (weight or kd_weight or vlr_kd_weight or (imitation_weight and imitation != "none")):
            raise OptionError("method 'ld' has no term: weight and kd_weight are 0; leave it out, or set one")
        if vlr_metric == "inside" and vlr_weight == "iou":
            raise OptionError("ld.vlr_metric=inside has no IoU to weigh by: set ld.vlr_weight to score or mask")
        self.grid, self.canvas = pair.grid, pair.canvas
        self.weight, self.temperature, self.joint = weight, temperature, joint
        self.vlr, self.vlr_weight = vlr, vlr_weight
        # a softmax over one class is constant: nothing to distil
        several = pair.student[CLS_LOGITS].dims[0] > 1
        self.kd_weight, self.vlr_kd_weight = (kd_weight, vlr_kd_weight) if several else (0.0, 0.0)
        self.kd_temperature = kd_temperature
        self.batch_ref = batch_ref
        self.imitation, self.imitation_weight = imitation, imitation_weight
        self.needs = self.reads({"imitation": imitation, "vlr_kd_weight": vlr_kd_weight})
        self.student_needs = (*self.needs, STUDENT_SCORES) if vlr_weight == "score" else self.needs
        self.adapter: nn.Module = nn.Identity()
        if imitation != "none" and imitation_weight and pair.student[FEATURES].dims != pair.teacher[FEATURES].dims:
            self.adapter = nn.Linear(pair.student[FEATURES].dims[0], pair.teacher[FEATURES].dims[0], bias=False)

    @classmethod
    def reads(cls, options: Mapping[str, Any]) -> tuple[Need, ...]:
        """Edges and class logits, those of the VLR where they are distilled, and what the imitation reads."""
        classes = (VLR_CLASSES,) if options["vlr_kd_weight"] else ()
        return (*cls.needs, *classes, *READS[options["imitation"]])

    @classmethod
    def warning(cls, detector: str, options: Mapping[str, Any], num_classes: int) -> str | None:
        """The published weight of the class term belongs to 80 classes, over which the divergence is averaged."""
        alike = options["kd_weight"] * num_classes / PUBLISHED_CLASSES
        if options["kd_weight"] != method_options(cls)["kd_weight"].default or not 1 < num_classes <= 20:
            return None
        return (
            f"kd_weight {options['kd_weight']:g} was published for {PUBLISHED_CLASSES} classes; averaged over {num_classes} "
            f"it weighs {PUBLISHED_CLASSES / num_classes:.0f} times as much. If the student trains badly, try --set "
            f"ld.kd_weight={alike:.2g}"
        )

    def forward(self, student: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
        """``main``, ``vlr``, ``kd``, ``vlr_kd`` and ``imitation``, without those whose weight is 0."""
        entries = batch.entries
        assert entries is not None
        union = entries.select(MAIN_OR_VLR)
        main = entries.select(Region.MAIN)[union]
        ours, theirs = student[EDGES.key], teacher[EDGES.key]
        if self.joint:
            edges = kl_rows(ours.flatten(1), theirs.flatten(1), self.temperature)
        else:
            edges = kl_rows(ours, theirs, self.temperature).sum(dim=-1)  # [M]
        images = mean_images(batch)
        scale = self.weight * self.batch_ref / images
        score = student[CLASSES.key].detach().sigmoid().amax(dim=-1)  # [M main]
        level = level_of(entries.index[entries.select(Region.MAIN)], self.grid, batch)
        terms = {}
        if self.weight:
            terms["main"] = scale * weighted_sum(edges[main], score, MAIN_DIVISOR)
        if self.weight and self.vlr:
            weight = self._vlr_weights(student, entries, union)
            divisor = VLR_MASK_DIVISOR if self.vlr_weight == "mask" else VLR_DIVISOR
            terms["vlr"] = scale * self.vlr * weighted_sum(edges, weight, divisor)
        if self.kd_weight:
            classes = (student[CLASSES.key], teacher[CLASSES.key])
            terms["kd"] = self.kd_weight * class_kd(*classes, level, len(self.grid.strides), self.kd_temperature)
        if self.vlr_kd_weight:
            vlr_level = level_of(entries.index[entries.select(Region.VLR)], self.grid, batch)
            classes = (student[VLR_CLASSES.key], teacher[VLR_CLASSES.key])
            rows = class_kd(*classes, vlr_level, len(self.grid.strides), self.kd_temperature)
            terms["vlr_kd"] = self.vlr_kd_weight * rows
        if self.imitation != "none" and self.imitation_weight:
            gate = levels_with_positives(level, len(self.grid.strides))
            loss = imitation_loss(self.imitation, self.adapter, student, teacher, batch, self.grid, gate)
            terms["imitation"] = self.imitation_weight * loss
        return terms

    def _vlr_weights(self, student: Tensors, entries: Entries, union: Tensor) -> Tensor:
        """Of each entry of the union [M], 0 outside the VLR: summing over the union saves picking the VLR's rows."""
        mask = entries.select(Region.VLR)[union].float()
        if self.vlr_weight == "score":
            return mask * student[STUDENT_SCORES.key].detach().sigmoid().amax(dim=-1)
        return mask if self.vlr_weight == "mask" else entries.weight[union]

    def active(self, batch: Batch, part: str) -> bool:
        """``vlr`` and ``vlr_kd`` need a VLR, the others positives."""
        region = Region.VLR if part.startswith("vlr") else Region.MAIN
        return batch.entries is not None and bool(batch.entries.select(region).any())

    def weight_option(self, part: str) -> str:
        """The terms of LD share one, the others have their own."""
        return "weight" if part in ("main", "vlr") else f"{part}_weight"


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
