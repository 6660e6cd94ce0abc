"""Batches and network outputs made by hand, for any method and detector, without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.detectors.base import Detector
from kdcli.detectors.build import DETECTORS, ModelSpec, build_detector
from kdcli.detectors.read import read, sample_proposals
from kdcli.errors import OptionError
from kdcli.geometry.assign import assign
from kdcli.geometry.regions import compute_entries
from kdcli.methods import METHODS
from kdcli.methods.base import Method, Pair
from kdcli.methods.resolve import check_pair, resolve_options
from kdcli.structures import FLAGS, Batch, Canvas, Entries, RowKey, Targets
from kdcli.tensors import BOX_REGRESSION, PROPOSAL_COUNT, Need, Tensors
from tests.support.selection import matrix

CANVAS, CONTENT, K = Canvas(96, 128), (60, 120), 3  # valid: 64 x 128
CHANNELS = 32
ONE = torch.tensor([[10.0, 12.0, 60.0, 50.0]])
TWO = torch.tensor([[10.0, 12.0, 60.0, 50.0], [70.0, 8.0, 118.0, 58.0]])
NONE = torch.zeros(0, 4)


# LD needs a distribution branch where the detector has none of its own
NAMES = (*DETECTORS, *(f"{name}+distribution" for name in ("retinanet", "atss", "fcos")))

# a method with options that give it other terms or other needs, e.g. ``ld:gi``
VARIANTS: dict[str, dict[str, Any]] = {
    "ld:fine_grained": {"imitation": "fine_grained"},
    "ld:gi": {"imitation": "gi"},
    "ld:fitnet": {"imitation": "fitnet"},
    "ld:inside_gt": {"imitation": "inside_gt"},
    "ld:main": {"imitation": "main"},
    "ld:defeat": {"imitation": "defeat"},
    "ld:vlr_kd": {"vlr_kd_weight": 10.0},
    "ld:joint": {"joint": True},
    "defeat:backbone": {"backbone_weight": 1.0},
    "defeat:proposals": {"fg_weight": 0.0, "bg_weight": 0.0, "obj_cls_weight": 2.0, "bg_cls_weight": 2.0},
}
PROPOSALS = 100  # of an image: all of them are drawn, so that a term does not depend on Targets.draws


@lru_cache(maxsize=32)
def detector_of(
    name: str, channels: int = CHANNELS, classes: int = K, reg_max: int = 8, backbone: str = "shufflenet_v2_x0_5"
) -> Detector:
    """A small detector, e.g. ``fcos`` or ``fcos+distribution``; its weights do not matter here."""
    name, _, box = name.partition("+")
    spec = ModelSpec(
        name,
        backbone,
        classes,
        channels,
        1,
        32,
        reg_max=reg_max,
        box=box or "default",  # type: ignore[arg-type]
    )
    return build_detector(spec).eval()


def pair_of(student: Detector, teacher: Detector) -> Pair:
    """The two as a method sees them."""
    return Pair(student.specs(), teacher.specs(), student.grid, CANVAS, student.spec.detector)


def resolved(name: str, detector: str, **given: object) -> dict[str, Any]:
    """All options of a method or of one of VARIANTS on a detector."""
    method = name.partition(":")[0]
    options = {**VARIANTS.get(name, {}), **given}
    return resolve_options(method, METHODS[method], detector.partition("+")[0], options)


def class_of(name: str) -> type[Method]:
    """The method of a name with or without a variant."""
    return METHODS[name.partition(":")[0]]


def _works(name: str, detector: str) -> bool:
    pair = pair_of(detector_of(detector), detector_of(detector))
    try:
        check_pair(name, class_of(name), resolved(name, detector), pair, "a", "b")
    except OptionError:
        return False
    return True


CASES = [(m, d) for m in METHODS for d in NAMES if _works(m, d)]  # every pair that check_pair lets through
VARIANT_CASES = [(v, d) for v in VARIANTS for d in NAMES if _works(v, d)]
EVERY = [*CASES, *VARIANT_CASES]


def on_gfl(case: tuple[str, str]) -> bool:
    """The cases that ``make test`` runs: GFL has an output for every method that works on a dense detector."""
    return case[1] == "gfl"


every = pytest.mark.parametrize(("name", "detector"), matrix(EVERY, on_gfl))
STUDENT, TEACHER = 1, 2  # seeds of their outputs


def many_boxes(count: int) -> Tensor:
    """``count`` random boxes inside the content."""
    generator = torch.Generator().manual_seed(count)
    low = torch.rand(count, 2, generator=generator) * torch.tensor([100.0, 45.0])
    size = 2 + torch.rand(count, 2, generator=generator) * torch.tensor([18.0, 13.0])
    return torch.cat([low, low + size], dim=1)


def make_batch(detector: Detector, boxes: Sequence[Tensor]) -> Batch:
    """A batch whose image i has ``boxes[i]``; entries of every region."""
    grid = detector.grid
    assigned = [assign(detector.assigner, grid, CANVAS, b, CONTENT) for b in boxes]
    targets = Targets(
        boxes=list(boxes),
        labels=[torch.arange(len(b)) % K for b in boxes],
        content=torch.tensor([CONTENT] * len(boxes)),
        canvas=CANVAS,
        assigned=torch.stack(assigned),
        valid=torch.stack([grid.valid(CANVAS, CONTENT)] * len(boxes)),
        draws=torch.arange(len(boxes)),
    )
    entries = [
        compute_entries(frozenset(FLAGS), detector.region_defaults, grid, CANVAS, b, a, CONTENT)
        for b, a in zip(boxes, assigned, strict=True)
    ]
    # a method that touched pixels or stored rows would fail on these
    pixels = torch.empty(0, dtype=torch.uint8)
    return Batch(pixels, targets, [RowKey(i, "identity") for i in range(len(boxes))], Entries.collate(entries))


def make_outputs(detector: Detector, images: int, seed: int) -> Tensors:
    """What a forward pass would give: leaf tensors with gradients, each image other numbers."""
    generator = torch.Generator().manual_seed(seed)
    rows = {"cell": detector.grid.num_cells(CANVAS), "anchor": detector.grid.num_total(CANVAS)}
    rows |= {f"level{k}": h * w for k, (h, w) in enumerate(detector.grid.level_shapes(CANVAS))}
    made = {
        name: torch.randn(images, rows[spec.per], *spec.dims, generator=generator)
        for name, spec in detector.specs().items()
        if spec.per != "proposal"
    }
    if detector.spec.detector == "fcos" and BOX_REGRESSION in made:
        made[BOX_REGRESSION] = made[BOX_REGRESSION].abs()  # distances, as its head gives them
    return {name: value.requires_grad_() for name, value in made.items()}


def outside_of(detector: Detector, batch: Batch, name: str) -> Tensor:
    """Rows [n] bool of the output ``name`` that lie outside the first image's valid area."""
    invalid, per = ~batch.targets.valid[0], detector.specs()[name].per
    if per == "anchor":
        return invalid.repeat_interleave(detector.grid.num_anchors)
    if per.startswith("level"):
        parts: tuple[Tensor, ...] = invalid.split([h * w for h, w in detector.grid.level_shapes(CANVAS)])
        return parts[int(per[5:])]
    return invalid


def first_image(outputs: Tensors, images: int) -> Tensors:
    """Outputs in which every one of ``images`` is the first image."""
    return {k: v.detach()[:1].repeat(images, *[1] * (v.ndim - 1)).requires_grad_() for k, v in outputs.items()}


class Watched(dict[str, Tensor]):
    """A dict that remembers which keys were read."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors)
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.used.add(key)
        return super().__getitem__(key)


def inputs(detector: Detector, outputs: Tensors, needs: Sequence[Need], batch: Batch) -> Watched:
    """The tensors that a method of these needs is given, and no other."""
    return Watched(read(detector, outputs, needs, batch.entries, batch.targets))


def student_needs(method: Method) -> tuple[Need, ...]:
    """What is read of the student."""
    return method.needs if method.student_needs is None else method.student_needs


def build(name: str, detector: str, **options: object) -> Method:
    """The method or variant with the options of its detector, for two equal nets."""
    net = detector_of(detector)
    return class_of(name)(pair_of(net, net), **resolved(name, detector, **options))


def both_sides(
    method: Method, student: Detector, ours: Tensors, teacher: Detector, theirs: Tensors, batch: Batch
) -> tuple[Watched, Watched]:
    """What ``method`` is given of the outputs of two networks, as a training step reads it."""
    needs, targets = student_needs(method), batch.targets
    if not any(need.region == "proposals" for need in method.needs):
        return inputs(student, ours, needs, batch), inputs(teacher, theirs, method.needs, batch)
    found = teacher.proposals(theirs, targets.content, targets.canvas)
    listed = [torch.cat([p[:PROPOSALS], b]) for p, b in zip(found, targets.boxes, strict=True)]
    stored = read(teacher, theirs, method.needs, batch.entries, targets, listed)
    stored[PROPOSAL_COUNT] = torch.tensor([len(boxes) for boxes in listed])
    stored, drawn = sample_proposals(student, stored, targets)
    return Watched(read(student, ours, needs, batch.entries, targets, drawn)), Watched(stored)


def terms_of(method: Method, student: Detector, outputs: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
    """The terms of ``method`` for outputs of two networks on the student's grid."""
    terms: dict[str, Tensor] = method(*both_sides(method, student, outputs, student, teacher, batch), batch)
    return terms


def total(terms: dict[str, Tensor]) -> Tensor:
    """Their sum."""
    return torch.stack(list(terms.values())).sum()


def take(batch: Batch, order: Sequence[int]) -> Batch:
    """The images of ``batch`` in another order."""
    old, t = batch.entries, batch.targets
    assert old is not None
    parts = [
        Entries(*(getattr(old, n)[old.image == i] for n in ("index", "flag", "gt", "weight", "image"))) for i in order
    ]
    targets = replace(
        t,
        boxes=[t.boxes[i] for i in order],
        labels=[t.labels[i] for i in order],
        content=t.content[list(order)],
        assigned=t.assigned[list(order)],
        valid=t.valid[list(order)],
        draws=None if t.draws is None else t.draws[list(order)],
    )
    return replace(batch, targets=targets, keys=[batch.keys[i] for i in order], entries=Entries.collate(parts))
