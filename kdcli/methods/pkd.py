"""PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient (NeurIPS 2022, arXiv
2207.02039).

Both nets' channels are standardised over the batch before they are compared, so that only the pattern of a channel
counts and not its scale: half the mean squared difference is 1 - Pearson's r. Weights are mmrazor's, whose developers
wrote the paper; their code divides the variance by n - 1, which makes the loss (1 - r)(n - 1)/n of n cells and lets the
batch size change it on small levels. Here it is 1 - r, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdcli.errors import OptionError
from kdcli.methods.base import Method, Pair
from kdcli.methods.maps import MAPS, channels, make_adapter
from kdcli.methods.reduce import world_moments
from kdcli.structures import Batch
from kdcli.tensors import Tensors, precise, world_mean

EPS = 1e-6  # of the standard deviation


class PKD(Method):
    """Imitation of standardised neck maps.

    Options: ``weight``, of each level; ``levels``: how many of the finest levels are compared (the configurations of the
    authors leave out the coarsest of five, of which a small image has only a few cells). Means and deviations are
    over the valid cells of the global batch, the teacher's too: a store holds raw features. When the channels differ, a
    1x1 convolution without bias (the mean would take it out), shared by the levels, maps the student's to the teacher's.
    """

    title = "Distillation via Pearson Correlation Coefficient, NeurIPS 2022, arXiv 2207.02039"
    evidence = "paper's abstract, its authors' code in mmrazor; the variance's divisor is ours"
    offline = "exact, dense"
    needs = (MAPS,)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"faster_rcnn": {"weight": 6.0}}
    reads_targets = False
    index_aligned = False

    def __init__(self, pair: Pair, *, weight: float = 10.0, levels: int = 4) -> None:
        super().__init__()
        if not 1 <= levels <= len(pair.grid.strides):
            raise OptionError(f"pkd.levels = {levels}: must be 1 to {len(pair.grid.strides)}, the levels of the neck")
        self.grid, self.weight, self.levels = pair.grid, weight, levels
        self.adapter = make_adapter(*channels(pair))

    def forward(self, student: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
        """``loss``, unless its weight is 0."""
        if not self.weight:
            return {}
        ours, theirs, valid = (
            self.grid.split_levels(v, batch.targets.canvas)[: self.levels]
            for v in (
                precise(self.adapter(precise(student[MAPS.key]))),
                precise(teacher[MAPS.key]),
                batch.targets.valid,
            )
        )
        levels = [pearson_loss(s, t, v) for s, t, v in zip(ours, theirs, valid, strict=True)]
        return {"loss": self.weight * torch.stack(levels).sum()}


def pearson_loss(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Half the mean squared difference of the standardised maps of one level: the mean over the channels of 1 - r.

    ``student``, ``teacher``: [B, cells, C]; ``valid``: [B, cells]. Without a valid cell, or with a single one, 0.
    """
    weight = valid[..., None].to(student.dtype)
    difference = standardise(student, weight) - standardise(teacher.detach(), weight)
    squares = (difference.square() * weight).sum() / student.shape[-1]
    return squares / (2 * world_mean(weight.sum()).clamp(min=1e-12))


def standardise(value: Tensor, weight: Tensor) -> Tensor:
    """``value`` [B, cells, C] with mean 0 and variance 1 of each channel over the valid cells of the global batch.

    ``weight``: [B, cells, 1]. A constant channel becomes 0.
    """
    mean, variance, _ = world_moments(value, weight)
    # eps inside the root: its gradient is finite for a constant channel
    return (value - mean) / (variance + EPS**2).sqrt()
