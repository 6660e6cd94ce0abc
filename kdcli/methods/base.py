"""What a distillation method is: the teacher tensors it needs, and a map from student and teacher tensors to loss terms.

A method sees the same keys on both sides: ``student[need.key]`` and ``teacher[need.key]`` hold the same tensor of the
two networks at the same places (``Need.key`` is ``name@region``). Sparse needs come as [M', ...] rows in the order of
the batch's entries in that region, dense ones as [B, P or N, ...]. Whether the teacher ran in this step or last week
cannot be told from here.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from kdcli.errors import OptionError, nearest
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec
from kdcli.options import convert
from kdcli.structures import Batch, Canvas
from kdcli.tensors import (
    BACKBONE,
    BOX_DISTRIBUTION,
    BOX_REGRESSION,
    DERIVED,
    FEATURES,
    Need,
    Tensors,
    TensorSpec,
)


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
    # what a store gives: "exact" (sparse: ground truth alone chooses), "exact, dense" or "approximation"; encodings apart
    offline: ClassVar[str] = "not stated"
    needs: tuple[Need, ...]  # of the teacher; a class attribute, and one of an instance whose options change it
    student_needs: tuple[Need, ...] | None = None  # what is read of the student, when it is not the same
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # detector -> options that differ there
    region_options: ClassVar[tuple[str, ...]] = ()  # options that decide which entries a store holds
    index_aligned: ClassVar[bool] = True  # reads logits or boxes by anchor index: both grids must be equal

    @classmethod
    def reads(cls, options: Mapping[str, Any]) -> tuple[Need, ...]:
        """The needs under resolved ``options``: what a store must hold. ``needs`` unless an option changes them."""
        return cls.needs

    @classmethod
    def caution(cls, detector: str, options: Mapping[str, Any], num_classes: int) -> str | None:
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
            if need.dense or need.region == "proposals":
                return True
            if need.region == "gt":
                found = any(len(boxes) for boxes in batch.targets.boxes)
            else:
                found = batch.entries is not None and bool(batch.entries.select(need.region).any())
            if found:
                return True
        return False


def method_options(method: type[Method]) -> dict[str, inspect.Parameter]:
    """The options of a method: its keyword-only arguments, by name."""
    parameters = inspect.signature(method.__init__).parameters
    return {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def resolve_options(
    name: str, method: type[Method], detector: str | tuple[str, ...], given: Mapping[str, Any],
    regions: RegionSpec | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All options of a method: its defaults, those for ``detector`` (the first of several names that has some), then what
    was ``given``.

    ``regions``: the detector's own, which its region options start from. Raises OptionError for an unknown option, with
    the nearest name, for a value of the wrong type, and for a number that no loss can use.
    """
    known = method_options(method)
    for option in given:
        if option not in known:
            raise OptionError(f"unknown option '{name}.{option}'{nearest(option, known)}")
    resolved = {n: p.default for n, p in known.items()}
    if regions is not None:
        resolved |= {o: getattr(regions, o) for o in method.region_options if hasattr(regions, o)}
    names = (detector,) if isinstance(detector, str) else detector
    resolved |= dict(next((method.defaults[n] for n in names if n in method.defaults), {}))
    hints = typing.get_type_hints(method.__init__)
    for option, value in given.items():
        if option not in hints:
            raise OptionError(f"option '{name}.{option}' of {method.__name__}.__init__ has no type hint; write one")
        resolved[option] = convert(f"{name}.{option}", value, hints[option])
    for option, value in resolved.items():
        if value is inspect.Parameter.empty:
            raise OptionError(f"option '{name}.{option}' has no default; give one with --set {name}.{option}=VALUE")
        _check_number(f"{name}.{option}", value)
    weights = [v for o, v in resolved.items() if o.endswith("weight") and isinstance(v, float)]
    if weights and not any(weights):
        raise OptionError(f"method '{name}' has no term: all its weights are 0; leave it out, or set one")
    return resolved


def _check_number(option: str, value: Any) -> None:
    """Weights push towards the teacher, never away; a temperature or a reference divides."""
    if not isinstance(value, float):
        return
    if not math.isfinite(value):
        raise OptionError(f"{option} = {value}: must be a finite number")
    if option.endswith("weight") and value < 0:
        raise OptionError(f"{option} = {value}: must not be negative")
    if option.endswith(("temperature", "batch_ref")) and value <= 0:
        raise OptionError(f"{option} = {value}: must be above 0")


def check_pair(
    name: str, method: type[Method], options: Mapping[str, Any], pair: Pair, student: str, teacher: str
) -> None:
    """Raise OptionError when ``student`` or ``teacher`` (model names) lacks a tensor that the method needs."""
    for need in method.reads(options):
        wanted = DERIVED.get(need.name, need.name)
        for side, model, specs in (("student", student, pair.student), ("teacher", teacher, pair.teacher)):
            if wanted not in specs:
                box = wanted == BOX_DISTRIBUTION and BOX_REGRESSION in specs
                fix = "train it with --set model.box=distribution; " if box else ""
                raise OptionError(
                    f"method '{name}' needs {wanted}, which the {side} {model} does not give; {fix}"
                    f"`kdcli methods` lists which detectors each method works on"
                )
        if wanted != FEATURES and wanted not in BACKBONE:
            ours, theirs = pair.student[wanted].dims, pair.teacher[wanted].dims
            if ours != theirs:
                raise OptionError(
                    f"method '{name}' compares {wanted} element by element: student {student} has {list(ours)}, "
                    f"teacher {teacher} has {list(theirs)}; they must agree"
                )
