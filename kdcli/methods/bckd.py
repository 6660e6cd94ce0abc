"""BCKD: Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection (ICCV 2023, arXiv 2308.14286).

Classes are distilled as K binary problems, as a dense head is trained, and boxes by their overlap with the teacher's.
Both sums run over every valid anchor and are weighted by how far the two nets' scores lie apart, so BCKD has a dense
store. Numbers are those of the official code (TinyTigerPan/BCKD); where paper and code differ, the option says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.errors import OptionError
from kdcli.geometry.boxes import EPS, aligned_giou, aligned_iou
from kdcli.methods.base import Method, Pair, method_options
from kdcli.structures import IGNORED, Batch
from kdcli.tensors import BOXES, CLS_LOGITS, Need, Region, Tensors, world_mean, world_sum

CLASSES = Need(CLS_LOGITS, Region.ALL)
BOX = Need(BOXES, Region.ALL)

Overlap = Literal["giou", "iou", "log_iou"]
RELEASED_ON = "gfl"  # the one detector that the authors' configurations give weights for
# elsewhere those of CrossKD (arXiv 2306.11369), whose class loss is the same
CROSSKD = {
    "retinanet": {"cls_weight": 1.0, "loc_weight": 1.0},
    "atss": {"cls_weight": 1.0, "loc_weight": 1.0},
    "fcos": {"cls_weight": 0.4, "loc_weight": 0.75},
}


class BCKD(Method):
    """Binary classification and IoU-based localization distillation over all valid anchors.

    Options: ``cls_weight``, ``loc_weight`` of the two terms (the paper's alpha1, alpha2); ``iou``: a box costs 1 - GIoU
    (``giou``, the code), 1 - IoU (``iou``, the paper) or -log IoU (``log_iou``); ``gate_levels``: a level on which the
    batch has no positive contributes nothing (the code; the paper has no such rule); ``beta``, at least 1: exponent of
    the class term's weight. That weight is part of the graph, as in the code; the box term's weight is not.
    """

    title = "Bridging Cross-task Protocol Inconsistency (BCKD), ICCV 2023, arXiv 2308.14286"
    evidence = "paper's abstract, official code; weights off GFL are CrossKD's"
    offline = "exact, dense"
    needs = (CLASSES, BOX)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = CROSSKD

    def __init__(
        self,
        pair: Pair,
        *,
        cls_weight: float = 1.0,
        loc_weight: float = 4.0,
        iou: Overlap = "giou",
        gate_levels: bool = True,
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        if beta < 1:
            raise OptionError(f"bckd.beta = {beta}: must be at least 1, or its gradient is infinite where scores agree")
        self.grid = pair.grid
        self.per_image = pair.detector != "fcos"
        self.cls_weight, self.loc_weight = cls_weight, loc_weight
        self.iou, self.gate_levels, self.beta = iou, gate_levels, beta

    @classmethod
    def warning(cls, detector: str, options: Mapping[str, Any], num_classes: int) -> str | None:
        """Off GFL the authors released no weights."""
        weights = {name: options[name] for name in ("cls_weight", "loc_weight")}
        general = {name: method_options(cls)[name].default for name in weights}
        if detector == RELEASED_ON or weights != CROSSKD.get(detector, general):
            return None
        source = f"those of CrossKD for {detector}" if detector in CROSSKD else f"those for {RELEASED_ON}"
        return (
            f"its authors released weights for {RELEASED_ON} only; cls_weight {weights['cls_weight']:g} and loc_weight "
            f"{weights['loc_weight']:g} are {source}. If it trains badly, lower bckd.loc_weight"
        )

    def forward(self, student: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
        """``cls`` and ``loc``, without those whose weight is 0."""
        targets = batch.targets
        counted = targets.valid.repeat_interleave(self.grid.num_anchors, dim=1) & (targets.assigned != IGNORED)
        positive = targets.assigned >= 0
        if self.gate_levels:
            counted = counted & level_gate(positive, self.grid.level_sizes(targets.canvas))
        weight = counted.float()
        average = positives(positive, per_image=self.per_image)
        classes = student[CLASSES.key], teacher[CLASSES.key]
        terms = {}
        if self.cls_weight:
            terms["cls"] = self.cls_weight * bckd_cls(*classes, weight, self.beta).sum() / average
        if self.loc_weight:
            # in strides, the unit that the eps of GIoU is meant for
            stride = self.grid.anchor_strides(targets.canvas, torch.float32, weight.device)[:, None]
            ours, theirs = student[BOX.key] / stride, teacher[BOX.key] / stride
            rows = bckd_loc(ours, theirs, weight * score_gap(*classes), self.iou)
            terms["loc"] = self.loc_weight * rows.sum() / average
        return terms

    def weight_option(self, part: str) -> str:
        """Each term has its own."""
        return f"{part}_weight"

    def active(self, batch: Batch, part: str) -> bool:
        """With the gate, a batch without positives has no loss."""
        return not self.gate_levels or bool((batch.targets.assigned >= 0).any())


def bckd_cls(
    student: Tensor, teacher: Tensor, weight: Tensor, beta: float = 1.0, *, detach_factor: bool = False
) -> Tensor:
    """Binary class distillation of each anchor, [...]: sum over classes of |p_T - p_S|^beta * BCE(z_S, p_T), weighted.

    ``student``, ``teacher``: class logits [..., K]; ``weight`` [...]. arXiv 2308.14286. The factor is part
    of the graph, as in the official code; the paper does not say, and ``detach_factor`` is its other reading. The
    teacher gets no gradient.
    """
    target = teacher.detach().sigmoid()
    scores = (student.detach() if detach_factor else student).sigmoid()
    factor = (target - scores).abs().pow(beta)
    entropy = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    return (factor * entropy).sum(dim=-1) * weight


def bckd_loc(student: Tensor, teacher: Tensor, weight: Tensor, iou: Overlap = "giou") -> Tensor:
    """What each box lacks in overlap with the teacher's, [...], weighted: 1 - GIoU, 1 - IoU or -log IoU.

    ``student``, ``teacher``: boxes [..., 4] xyxy in strides; ``weight`` [...]. arXiv 2308.14286. The
    teacher gets no gradient. IoU is at least 1e-6, as in mmdet.
    """
    teacher = teacher.detach()
    if iou == "giou":
        return (1 - aligned_giou(student, teacher)) * weight
    overlap = aligned_iou(student, teacher).clamp(min=EPS)
    return (1 - overlap if iou == "iou" else -overlap.log()) * weight


def score_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """The largest |p_T - p_S| over an anchor's classes, [...], of logits [..., K]; without gradient."""
    return (teacher.detach().sigmoid() - student.detach().sigmoid()).abs().amax(dim=-1)


def level_gate(positive: Tensor, level_sizes: list[int]) -> Tensor:
    """Anchors [N] bool of the levels on which the global batch has a positive; ``positive`` [B, N] bool."""
    counts = torch.stack([level.sum() for level in torch.split(positive, level_sizes, dim=1)]).float()
    opened = world_sum(counts) > 0
    return torch.cat([opened[i].expand(size) for i, size in enumerate(level_sizes)])


def positives(positive: Tensor, *, per_image: bool) -> Tensor:
    """What the sums are divided by, as the detectors' own losses are: positives of the global batch, a mean over processes.

    ``positive`` [B, N] bool. ``per_image``: an image without positives counts as 1 (anchor heads); else the total is at
    least 1 (FCOS).
    """
    counts = positive.sum(dim=1).float()
    if per_image:
        return world_mean(counts.clamp(min=1).sum())
    return world_mean(counts.sum(), least=1)
