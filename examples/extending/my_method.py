"""A distillation method in one file: the student's neck features imitate the teacher's, by mean squared error.

The oldest feature distillation, the hints of FitNets (arXiv 1412.6550), on a detector's neck: everywhere, or where the
assigner has positives.

    kdcli --plugin examples/extending/my_method.py distill --method hint --set hint.scope=positives ...
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from kdcli.methods.base import Method, Pair
from kdcli.structures import Batch
from kdcli.tensors import FEATURES, Need, Tensors, precise, world_mean

EVERYWHERE = Need(FEATURES, "all")  # dense: [B, P, C]
POSITIVES = Need(FEATURES, "main")  # sparse: [M, C], a row for each positive of the batch

Scope = Literal["all", "positives"]


def needs_of(scope: Scope) -> tuple[Need, ...]:
    """What is read of the teacher, and so stored."""
    return (EVERYWHERE,) if scope == "all" else (POSITIVES,)


class Hint(Method):
    """Mean squared error of the neck features.

    Options: ``weight``; ``scope``: every valid cell (``all``, a dense store) or the assigner's ``positives`` (sparse).
    """

    title = "hints of FitNets on the neck, ICLR 2015, arXiv 1412.6550"
    evidence = "our own choice of place: the paper has no detector"
    offline = "exact, dense"
    needs: tuple[Need, ...] = (EVERYWHERE,)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"varifocal": {"weight": 0.5}}

    def __init__(self, pair: Pair, *, weight: float = 1.0, scope: Scope = "all") -> None:
        super().__init__()
        self.weight, self.scope = weight, scope
        self.needs = needs_of(scope)
        ours, theirs = pair.student[FEATURES].dims[0], pair.teacher[FEATURES].dims[0]
        # a 1x1 convolution on [B, P, C] is a linear map of the last dimension; without a term it would have no gradient
        adapts = bool(weight) and ours != theirs
        self.adapter = nn.Linear(ours, theirs, bias=False) if adapts else nn.Identity()

    @classmethod
    def reads(cls, options: Mapping[str, Any]) -> tuple[Need, ...]:
        """The needs, known before there is a student."""
        return needs_of(options["scope"])

    def forward(self, student: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
        """``loss``, unless its weight is 0: the mean over the read cells of all processes, and over the channels."""
        if not self.weight:
            return {}
        (need,) = self.needs
        ours, theirs = precise(self.adapter(student[need.key])), teacher[need.key].detach()
        error = (ours - theirs).square().mean(dim=-1)  # [B, P] or [M]
        if need.dense:
            read = batch.targets.valid.to(error.dtype)  # a store holds nothing in the padding
            count = read.sum()
            error = error * read
        else:
            count = error.new_tensor(float(len(error)))
        # the mean over processes, since DDP averages their gradients; a process may have no positive, or all of them
        return {"loss": self.weight * error.sum() / world_mean(count).clamp(min=1e-6)}

    def active(self, batch: Batch, part: str) -> bool:
        """Another method's entries do not count: without a positive the loss is rightly 0."""
        if self.scope == "all":
            return True
        assert batch.entries is not None  # the loop finds them whenever a need is sparse
        return bool(batch.entries.select("main").any())


METHODS = {"hint": Hint}
