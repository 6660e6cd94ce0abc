"""What a distillation method is: the teacher tensors it needs, and a map from student and teacher tensors to loss terms.

A method sees the same keys on both sides: ``student[need.key]`` and ``teacher[need.key]`` hold the same tensor of the
two networks at the same places (``Need.key`` is ``name@region``). Sparse needs come as [M', ...] rows in the order of
the batch's entries in that region, dense ones as [B, P or N, ...]. Whether the teacher ran in this step or last week
cannot be told from here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from kdcli.geometry.grid import Grid
from kdcli.structures import Batch, Canvas
from kdcli.tensors import Need, Region, Tensors, TensorSpec

APPROXIMATION = "approximation"  # the value of ``Method.offline`` that reports mark


@dataclass(frozen=True)
class Pair:
    """The two networks as a method sees them: what each gives, on which grid."""

    student: Mapping[str, TensorSpec]
    teacher: Mapping[str, TensorSpec]
    grid: Grid
    canvas: Canvas
    detector: str  # what the student is, e.g. "gfl" ("fcos" for tv_fcos too): chooses per-detector defaults


class Method(nn.Module):
    """Base of all methods. Options are the keyword-only arguments of ``__init__`` after ``pair``."""

    title: ClassVar[str]  # paper, venue, arXiv id
    evidence: ClassVar[str] = "not stated"  # what the implementation rests on, and what of it is ours; one line
    # what a store gives: "exact" (sparse: ground truth alone chooses), "exact, dense" or APPROXIMATION; encodings apart
    offline: ClassVar[str] = "not stated"
    needs: tuple[Need, ...]  # of the teacher; a class attribute, and one of an instance whose options change it
    student_needs: tuple[Need, ...] | None = None  # what is read of the student, when it is not the same
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # detector -> options that differ there
    region_options: ClassVar[tuple[str, ...]] = ()  # options that decide which entries a store holds
    reads_targets: ClassVar[bool] = True  # boxes, labels or assignment of the batch; False: at most its padding
    index_aligned: ClassVar[bool] = True  # reads logits or boxes by anchor index: both grids must be equal

    @classmethod
    def reads(cls, options: Mapping[str, Any]) -> tuple[Need, ...]:
        """The needs under resolved ``options``: what a store must hold. ``needs`` unless an option changes them."""
        return cls.needs

    @classmethod
    def warning(cls, detector: str, options: Mapping[str, Any], num_classes: int) -> str | None:
        """What the user should know of resolved ``options`` on ``detector`` (``Pair.detector``): said as a run starts."""
        return None

    def forward(self, student: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
        """Weighted loss terms by name, each a scalar over the global batch; results call them ``<method>_<name>``."""
        raise AssertionError(f"{type(self).__name__} has no forward")

    def weight_option(self, part: str) -> str:
        """The option that scales the term ``part``: what a message tells the user to lower."""
        return "weight"

    def active(self, batch: Batch, part: str) -> bool:
        """Whether the term ``part`` can differ from 0 on this batch; one that is 0 for long while active stops the run."""
        for need in self.needs:
            if need.dense or need.region == Region.PROPOSALS:
                return True
            if need.region == Region.GT:
                found = any(len(boxes) for boxes in batch.targets.boxes)
            else:
                found = batch.entries is not None and bool(batch.entries.select(need.region).any())
            if found:
                return True
        return False


def student_needs_of(methods: Iterable[Method]) -> tuple[Need, ...]:
    """What ``methods`` together read of the student, sorted."""
    both = [m.needs if m.student_needs is None else m.student_needs for m in methods]
    return tuple(sorted({need for needs in both for need in needs}))


def method_options(method: type[Method]) -> dict[str, inspect.Parameter]:
    """The options of a method: its keyword-only arguments, by name."""
    parameters = inspect.signature(method.__init__).parameters
    return {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
