"""Batches and network outputs made by hand, for any method and detector, without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from kdcli.detectors.base import Detector
from kdcli.detectors.build import DETECTORS, ModelSpec, build_detector
from kdcli.detectors.read import read
from kdcli.errors import OptionError
from kdcli.geometry.assign import assign
from kdcli.geometry.regions import compute_entries
from kdcli.methods import METHODS
from kdcli.methods.base import Method, Pair, check_pair, resolve_options
from kdcli.structures import FLAGS, Batch, Canvas, Entries, RowKey, Targets
from kdcli.tensors import BOX_REGRESSION, Need, Tensors

CANVAS, CONTENT, K = Canvas(96, 128), (60, 120), 3  # valid: 64 x 128
CHANNELS = 32
ONE = torch.tensor([[10.0, 12.0, 60.0, 50.0]])
TWO = torch.tensor([[10.0, 12.0, 60.0, 50.0], [70.0, 8.0, 118.0, 58.0]])
NONE = torch.zeros(0, 4)


# LD needs a distribution branch where the detector has none of its own
NAMES = (*DETECTORS, *(f"{name}+distribution" for name in ("retinanet", "atss", "fcos")))


@lru_cache(maxsize=32)
def detector_of(name: str, channels: int = CHANNELS, classes: int = K, reg_max: int = 8) -> Detector:
    """A small detector, e.g. ``fcos`` or ``fcos+distribution``; its weights do not matter here."""
    name, _, box = name.partition("+")
    spec = ModelSpec(
        name,
        "shufflenet_v2_x0_5",
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


def _works(method: str, detector: str) -> bool:
    try:
        options = resolve_options(method, METHODS[method], detector.partition("+")[0], {})
        check_pair(method, METHODS[method], options, pair_of(detector_of(detector), detector_of(detector)), "a", "b")
    except OptionError:
        return False
    return True


CASES = [(m, d) for m in METHODS for d in NAMES if _works(m, d)]  # every pair that check_pair lets through


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
        return invalid.split([h * w for h, w in detector.grid.level_shapes(CANVAS)])[int(per[5:])]
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


def build(name: str, detector: str, teacher: Detector | None = None, **options: object) -> Method:
    """The method with the options of its detector; student and teacher alike unless ``teacher`` is another."""
    student = detector_of(detector)
    resolved = resolve_options(name, METHODS[name], student.spec.detector, options)
    return METHODS[name](pair_of(student, teacher or student), **resolved)


def terms_of(method: Method, student: Detector, outputs: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
    """The terms of ``method`` for outputs of two networks on the student's grid."""
    ours = inputs(student, outputs, student_needs(method), batch)
    theirs = inputs(student, teacher, method.needs, batch)
    terms: dict[str, Tensor] = method(ours, theirs, batch)
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
