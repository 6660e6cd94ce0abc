"""PFI: Prediction-guided Feature Imitation (AAAI 2022, arXiv 2112.04840).

Student features imitate the teacher's where the two nets' class predictions differ. The weight depends on the student,
so the teacher's features and class logits are needed at every cell: PFI has a dense store. There is no official code;
docs/methods/rm_pfi.md tells which open point was settled how.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kdcli.methods.base import Method, Pair
from kdcli.methods.divergence import squared_rows
from kdcli.methods.maps import MAPS, channels, make_adapter, mean_images
from kdcli.structures import Batch
from kdcli.tensors import CLS_LOGITS, Need, Region, Tensors, precise

CLASSES = Need(CLS_LOGITS, Region.ALL)

Space = Literal["prob", "logit"]
Form = Literal["squared", "linear", "norm"]
# A re-implementation's 1.5 on the squared mean over a cell's outputs, as it was tried with 3 classes (docs/results/bccd.md):
# 1.5 * (sum / 3)^2. On the mean itself the term goes as 1 / (A*K)^2: with RetinaNet's 720 outputs of COCO it was 5e-5 at
# the first step (decision 25).
WEIGHT = 1.5 / 3**2
# RetinaNet's nine anchors of a cell say nearly the same, and the loss squares their sum: with 1/6 a student of the blood cells
# went to 0.2 AP, with a third of it to 24.3, with a ninth to 27.5; plain 20.3 (docs/results/bccd.md)
RETINANET_WEIGHT = WEIGHT / 9


class PFI(Method):
    """Feature imitation weighted by the difference of the predictions.

    Options: ``weight``, chosen for the default form; ``pred_space``: differences of probabilities (default) or of logits;
    ``form``: ``squared`` (the paper's), ``linear`` or ``norm``; ``detach_pdif`` stops the gradient through the weight. When
    the channels differ, a 1x1 convolution without bias maps student features to the teacher's; it is trained, and left
    behind at export.
    """

    title = "Prediction-guided Feature Imitation, AAAI 2022, arXiv 2112.04840"
    evidence = "paper's abstract, re-implementations; probabilities, their sum over outputs and its weight are ours"
    offline = "exact, dense"
    needs = (MAPS, CLASSES)
    reads_targets = False
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"retinanet": {"weight": RETINANET_WEIGHT}}

    def __init__(
        self,
        pair: Pair,
        *,
        weight: float = WEIGHT,
        pred_space: Space = "prob",
        form: Form = "squared",
        detach_pdif: bool = False,
    ) -> None:
        super().__init__()
        self.grid = pair.grid
        self.weight, self.form, self.detach_pdif = weight, form, detach_pdif
        self.pred_space = pred_space
        self.adapter = make_adapter(*channels(pair))

    @classmethod
    def warning(cls, detector: str, options: Mapping[str, Any], num_classes: int) -> str | None:
        """A weight that was meant for the mean over a cell's outputs would now be far too large."""
        if options["form"] != "squared" or options["pred_space"] != "prob" or options["weight"] < 1:
            return None
        return (
            f"weight {options['weight']:g} is {options['weight'] / WEIGHT:.0f} times the default, {WEIGHT:.3g}: P is the sum "
            "over a cell's class outputs, for whose mean 1.5 was the weight of re-implementations"
        )

    def forward(self, student: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
        """``loss``, unless its weight is 0."""
        if not self.weight:
            return {}
        features = precise(self.adapter(student[MAPS.key]))
        p_dif = prediction_difference(
            student[CLASSES.key], teacher[CLASSES.key], batch.targets.valid.shape[1], space=self.pred_space
        )
        if self.detach_pdif:
            p_dif = p_dif.detach()
        f_dif = squared_rows(features, teacher[MAPS.key])  # [B, P]
        sizes = self.grid.level_cells(batch.targets.canvas)
        per_image = imitation_loss(p_dif, f_dif, batch.targets.valid, sizes, form=self.form)
        images = mean_images(batch)
        return {"loss": self.weight * per_image.sum() / images}


def prediction_difference(student: Tensor, teacher: Tensor, num_cells: int, *, space: Space = "prob") -> Tensor:
    """P_dif [B, P]: sum over a cell's A*K outputs of the squared difference of predictions.

    ``student``, ``teacher``: class logits [B, N, K]. A sum, so that a class more, which both nets are sure is not there,
    changes nothing.
    """
    teacher = teacher.detach()
    if space == "prob":
        student, teacher = student.sigmoid(), teacher.sigmoid()
    return (student - teacher).square().reshape(student.shape[0], num_cells, -1).sum(dim=-1)


def imitation_loss(
    p_dif: Tensor, f_dif: Tensor, valid: Tensor, level_sizes: list[int], *, form: Form = "squared"
) -> Tensor:
    """L_PFI of each image [B]: over the levels, the mean of ||P * F||^2 / HW (``squared``).

    ``p_dif``, ``f_dif``: [B, P]; ``valid``: [B, P] bool, cells in the sum and in HW; ``level_sizes``: cells per level.
    ``linear``: mean of P * F; ``norm``: ||P * F|| / HW. A level without valid cells gives 0.
    """
    product = torch.where(valid, p_dif * f_dif, torch.zeros_like(p_dif))
    losses = []
    for value, mask in zip(torch.split(product, level_sizes, 1), torch.split(valid, level_sizes, 1), strict=True):
        cells = mask.sum(dim=1).clamp(min=1)
        if form == "squared":
            losses.append(value.square().sum(dim=1) / cells)
        elif form == "linear":
            losses.append(value.sum(dim=1) / cells)
        else:
            # the gradient of a norm is undefined at 0, where an invalid level sits: 1e-24 keeps it finite
            losses.append((value.square().sum(dim=1) + 1e-24).sqrt() / cells)
    return torch.stack(losses).mean(dim=0)
