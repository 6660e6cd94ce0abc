"""Distillation losses for somebody else's training loop: the methods of ``kdcli distill``, built and called as it does."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.api.arguments import method_list, method_options
from kdcli.api.batch import TeacherBatch
from kdcli.api.store import Store
from kdcli.detectors.base import Detector
from kdcli.detectors.build import default_keys, detector_names
from kdcli.detectors.read import read
from kdcli.engine.teacher.binding import inherit_regions
from kdcli.engine.teacher.match import require_match, require_strides
from kdcli.engine.teacher.specs import TeacherSide, region_spec
from kdcli.errors import OptionError, did_you_mean
from kdcli.methods.base import Method, Pair, student_needs_of
from kdcli.methods.resolve import all_needs, check_pair, find_methods, resolve_all
from kdcli.structures import Canvas
from kdcli.tensors import (
    BOXES,
    CLS_LOGITS,
    DERIVED,
    RANK,
    Need,
    Per,
    Region,
    Tensors,
    TensorSpec,
    per_level,
    precise,
    spec_of,
)

Dims = int | tuple[int, ...]


def losses(
    methods: str | Sequence[str], *, store: Store, student: Detector | Mapping[str, Dims],
    options: Mapping[str, Mapping[str, Any]] | None = None, detector: str | None = None,
) -> Losses:  # fmt: skip
    """The losses of ``methods``, e.g. ``"ld,pfi"``, between the store's teacher and ``student``.

    ``student``: a kdcli detector; or, for any other network, the trailing dims of the tensors that it gives, e.g.
    ``{"features": 256}`` for FPN maps of 256 channels, ``{"cls_logits": 80, "box_distribution": (4, 17)}``: on the store's
    own levels and anchors. ``options``: of methods, as ``{"ld": {"temperature": 8.0}}``; None: those of ``open_store``.
    ``detector``: of another network, whose defaults its methods take (``"fcos"``); None: the teacher's.
    Raises OptionError for an unknown name or when a method cannot work on the two, and StoreError when the store lacks
    what it reads or is of other anchors. What a user should know of an option is a Python warning,
    where the command prints a line.
    """
    _require_kinds(store, student, detector)
    side = store._teacher
    reader = side.reader
    assert reader is not None
    text = method_list(methods)
    known = find_methods(text)
    stored = {n: o for n, o in store.options.items() if n in known}
    given = stored if options is None else method_options(options, known, text)
    net = student if isinstance(student, Detector) else Foreign(student, side)
    name = student.spec.name if isinstance(student, Detector) else "network"
    teacher = reader.manifest.teacher.detector
    keys = default_keys(net.spec.detector if isinstance(student, Detector) else detector or teacher)
    resolved = inherit_regions(resolve_all(known, keys, given, net.region_defaults), known, reader, given)
    pair = Pair(net.specs(), side.specs, net.grid, reader.schema.canvas, keys[-1])
    for n, method in known.items():
        check_pair(n, method, resolved[n], pair, name, side.name)
        if warning := method.warning(keys[-1], resolved[n], len(store.classes)):
            warnings.warn(f"{n}: {warning}", stacklevel=2)
    built = {n: method(pair, **resolved[n]) for n, method in known.items()}
    _require_needs(store, set(all_needs(known, resolved)))
    require_strides(side, net)
    if any(method.index_aligned for method in known.values()):
        regions = region_spec(reader.manifest.region_spec, known, resolved)
        require_match(reader, None, reader.schema.canvas, (), (net.grid, net.assigner, regions))
    return Losses(built, net)


class Losses(nn.Module):
    """Weighted loss terms of a batch. Has parameters where channels differ (adapters): give them to the optimiser too.

    ``student_needs``: what ``forward`` is given, by ``Need.key``. ``reads_targets``: whether boxes and labels are read.
    """

    def __init__(self, methods: Mapping[str, Method], student: Detector) -> None:
        super().__init__()
        self.methods = nn.ModuleDict(dict(methods))
        self.to(memory_format=torch.channels_last)  # as in `kdcli distill`
        self.student_needs = student_needs_of(methods.values())
        self.reads_targets = any(m.reads_targets for m in methods.values())
        for name, method in methods.items():
            if any(n.region == Region.PROPOSALS for n in method.needs):
                raise OptionError(
                    f"method '{name}' samples the teacher's proposals with the student's RoI head, which only kdcli.distill "
                    "does; set the weights of its terms at proposals to 0"
                )
        specs = student.specs()
        self._dims = {need.key: spec_of(need.name, specs).dims for need in self.student_needs}
        self._outputs = {name: specs[name] for need in self.student_needs for name in _read_of(need, student)}
        self._grid = student.grid
        self._read = functools.partial(read, student)  # no module of this one: the student's parameters stay its own

    def read(self, outputs: Mapping[str, Tensor], batch: TeacherBatch) -> Tensors:
        """What ``forward`` is given, of a detector's dense outputs by name ([B, P, C], [B, N, ...]); differentiable.

        The same reading as in ``kdcli distill``: sparse tensors are gathered at ``batch.entries``. Raises OptionError for
        an output that is missing or of another shape.
        """
        self._check_outputs(outputs, batch)
        exact = {name: precise(value) for name, value in outputs.items()}
        return self._read(exact, self.student_needs, batch.entries, batch.batch.targets)

    def forward(self, student: Mapping[str, Tensor], batch: TeacherBatch) -> dict[str, Tensor]:
        """Loss terms, weighted, each a scalar: ``<method>_<term>``, as in results.csv. Computed in float32 at least.

        ``student``: tensors by ``name@region``: dense [B, P, C] or [B, N, ...], sparse [M', ...] at ``batch.entries`` of
        the region. Raises OptionError for one that is missing or of another shape, and without the boxes that are read.
        """
        if self.reads_targets:
            batch.require_targets(f"the losses of {', '.join(self.methods)} read the ground truth")
        self._check(student, batch)
        terms: dict[str, Tensor] = {}
        with torch.autocast(batch.valid.device.type, enabled=False):
            exact = {key: precise(value) for key, value in student.items()}
            for name, method in self.methods.items():
                found = method(exact, batch.tensors, batch.batch)
                terms.update({f"{name}_{part}": term for part, term in found.items()})
        return terms

    def _check_outputs(self, outputs: Mapping[str, Tensor], batch: TeacherBatch) -> None:
        canvas, levels = batch.canvas, self._grid.level_cells(batch.canvas)
        rows: dict[str, int] = {Per.CELL: self._grid.num_cells(canvas), Per.ANCHOR: self._grid.num_total(canvas)}
        rows |= {per_level(level): count for level, count in enumerate(levels)}
        for name, spec in self._outputs.items():
            if name not in outputs:
                there = ", ".join(outputs) or "none"
                raise OptionError(f"output '{name}' of the student is missing; there are: {there}")
            found, wanted = tuple(outputs[name].shape), (len(batch.keys), rows[spec.per], *spec.dims)
            if found != wanted:
                raise OptionError(f"output '{name}' of the student is {list(found)}, this batch needs {list(wanted)}")

    def _check(self, student: Mapping[str, Tensor], batch: TeacherBatch) -> None:
        for need in self.student_needs:
            if need.key not in student:
                raise OptionError(f"the student's '{need.key}' is missing{did_you_mean(need.key, student)}")
            found, dims = tuple(student[need.key].shape), self._dims[need.key]
            wanted = (*self._rows(need, batch), *dims)
            if found != wanted:
                raise OptionError(f"the student's '{need.key}' is {list(found)}, this batch needs {list(wanted)}")

    def _rows(self, need: Need, batch: TeacherBatch) -> tuple[int, ...]:
        """Leading dims of a tensor of the student."""
        if need.at_entries:
            assert batch.entries is not None
            return (int(batch.entries.select(need.region).sum()),)
        shape = batch.tensors[need.key].shape
        return tuple(shape[:2] if need.dense else shape[:1])


class Foreign(Detector):
    """A network that is no kdcli detector, as the methods see it: on the store's grid, with the dims that it was said to
    give. It is never run."""

    def __init__(self, dims: Mapping[str, Dims], teacher: TeacherSide) -> None:
        super().__init__()
        reader = teacher.reader
        assert reader is not None
        for name in dims:
            if name not in teacher.specs:
                raise OptionError(f"student: unknown tensor '{name}'{did_you_mean(str(name), teacher.specs)}")
        self.grid = reader.schema.grid
        self.assigner = reader.manifest.assigner_spec
        self.region_defaults = reader.manifest.region_spec
        self._specs = {
            name: TensorSpec(teacher.specs[name].per, size if isinstance(size, tuple) else (size,))
            for name, size in dims.items()
        }

    def specs(self) -> Mapping[str, TensorSpec]:
        """What it was said to give."""
        return self._specs

    @property
    def box_name(self) -> str:
        """Nobody knows how its boxes are coded. Raises OptionError."""
        raise OptionError(
            "a network that is no kdcli detector has boxes of its own coding: give 'rank@main' to the losses by yourself, "
            "[M, 2]: the score of the ground-truth class and the IoU of each positive"
        )

    def dense_boxes(self, outputs: Tensors, canvas: Canvas) -> Tensor:
        """Nobody knows how its boxes are coded. Raises OptionError."""
        raise OptionError(
            "a network that is no kdcli detector has boxes of its own coding: give 'boxes@all' to the losses by yourself, "
            "[B, N, 4] xyxy canvas pixels"
        )


def _read_of(need: Need, student: Detector) -> tuple[str, ...]:
    """The outputs that ``Losses.read`` makes the tensor of ``need`` of; none where it cannot (``Foreign.box_name``)."""
    if need.name not in (RANK, BOXES):
        return (DERIVED.get(need.name, need.name),)
    boxes = () if isinstance(student, Foreign) else (student.box_name,)
    return (CLS_LOGITS, *boxes) if need.name == RANK else boxes


def _require_kinds(store: object, student: object, detector: str | None) -> None:
    """Raises OptionError for what is no store, no student or no detector's name."""
    if not isinstance(store, Store):
        raise OptionError(f"store = {store!r}: give what kdcli.open_store returns")
    if not isinstance(student, Detector | Mapping):
        raise OptionError(
            f"student = {student!r}: give a kdcli detector, or its dims by tensor, as {{'features': 256}}"
        )
    if detector is not None and detector not in detector_names():
        raise OptionError(f"unknown detector '{detector}'{did_you_mean(str(detector), detector_names())}")


def _require_needs(store: Store, needs: set[Need]) -> None:
    """Raises StoreError when the store lacks one, OptionError when it was opened without."""
    assert store._teacher.reader is not None
    store._teacher.reader.schema.restrict(sorted(needs))
    unread = sorted(needs - set(store.needs))
    if unread:
        raise OptionError(
            f"open_store was given methods '{store.methods}', which do not read {', '.join(n.key for n in unread)}; "
            "name these methods there too"
        )
