"""BCKD: what its sums run over, what they are divided by, and what stays out of the graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.errors import OptionError
from kdcli.geometry.boxes import aligned_giou
from kdcli.methods.base import Pair
from kdcli.methods.bckd import BCKD, BOX, CLASSES, bckd_cls, bckd_loc, level_gate, positives, score_gap
from kdcli.methods.resolve import resolve_options
from kdcli.structures import IGNORED, Batch
from kdcli.tensors import BOXES, CLS_LOGITS, Tensors
from tests.support.method_case import NONE, ONE, TWO, detector_of, inputs, make_batch, many_boxes, pair_of, take
from tests.support.process_case import on_two_processes

GFL, RETINANET = detector_of("gfl"), detector_of("retinanet")
DETECTORS = pytest.mark.parametrize("detector", [GFL, RETINANET], ids=["gfl", "retinanet"])


def bckd(detector: Any = GFL, **options: Any) -> BCKD:
    return BCKD(pair_of(detector, detector), **options)


def data(detector: Any, batch: Batch) -> tuple[Tensors, Tensors]:
    """Outputs of both nets; the student's boxes and logits are leaves."""
    shape = (len(batch.keys), detector.grid.num_total(batch.targets.canvas))
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        {
            name: torch.randn(*shape, *detector.specs()[name].dims, generator=generator)
            for name in (CLS_LOGITS, detector.box_name)
        }
        for _ in range(2)
    )
    ours, theirs = (inputs(detector, outputs, BCKD.needs, batch) for outputs in (ours, theirs))
    student = {k: v.detach().requires_grad_() for k, v in ours.items()}
    return student, {k: v.detach() for k, v in theirs.items()}


def test_class_loss_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 1.0]])
    p, q = student.sigmoid(), teacher.sigmoid()
    entropy = -(q * p.log() + (1 - q) * (1 - p).log())
    for beta in (1.0, 2.0):
        by_hand = ((p - q).abs() ** beta * entropy).sum()
        assert float(bckd_cls(student, teacher, torch.ones(1), beta)) == pytest.approx(float(by_hand), rel=1e-6)
    assert float(bckd_cls(student, teacher, torch.zeros(1))) == 0


def test_the_factor_of_the_class_loss_is_in_the_graph() -> None:
    student, teacher = torch.tensor([[1.0, -2.0]], requires_grad=True), torch.tensor([[0.5, 1.0]])
    (ours,) = torch.autograd.grad(bckd_cls(student, teacher, torch.ones(1)).sum(), student)
    factor = (student.detach().sigmoid() - teacher.sigmoid()).abs()
    entropy = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")
    (detached,) = torch.autograd.grad((factor * entropy).sum(), student)
    p = student.detach().sigmoid()
    whole = detached + (p - teacher.sigmoid()).sign() * p * (1 - p) * entropy.detach()
    torch.testing.assert_close(ours, whole)
    assert not torch.allclose(ours, detached)
    without = bckd_cls(student, teacher, torch.ones(1), detach_factor=True).sum()
    torch.testing.assert_close(torch.autograd.grad(without, student)[0], detached)


@pytest.mark.parametrize("form", ["giou", "iou", "log_iou"])
def test_box_loss_of_boxes_that_do_not_meet(form: Any) -> None:
    ours = torch.tensor([[0.0, 0, 2, 2]], requires_grad=True)
    row = bckd_loc(ours, torch.tensor([[3.0, 3, 5, 5]]), torch.ones(1), form)
    (gradient,) = torch.autograd.grad(row.sum(), ours)
    assert torch.isfinite(row).all()
    assert bool(gradient.any()) == (form == "giou")  # the IoU has no gradient there
    expected = {"giou": 1.68, "iou": 1.0, "log_iou": 13.8155}[form]
    assert float(row.detach()) == pytest.approx(expected, rel=1e-5)


@DETECTORS
def test_the_method_is_the_sum_of_its_parts(detector: Any) -> None:
    batch = make_batch(detector, [TWO, NONE, many_boxes(15)])
    ours, theirs = data(detector, batch)
    targets, grid = batch.targets, detector.grid
    terms = bckd(detector)(ours, theirs, batch)
    assert list(terms) == ["cls", "loc"]
    counted = targets.valid.repeat_interleave(grid.num_anchors, dim=1) & (targets.assigned != IGNORED)
    average = (targets.assigned >= 0).sum(dim=1).clamp(min=1).sum()
    stride = grid.anchor_strides(targets.canvas, torch.float32)[:, None]
    cls = loc = torch.zeros(())
    start = 0
    for size in grid.level_sizes(targets.canvas):
        level = slice(start, start + size)
        start += size
        if not (targets.assigned[:, level] >= 0).any():
            continue
        z, t, weight = ours[CLASSES.key][:, level], theirs[CLASSES.key][:, level], counted[:, level].float()
        gap = (z.sigmoid() - t.sigmoid()).abs()
        entropy = F.binary_cross_entropy_with_logits(z, t.sigmoid(), reduction="none")
        boxes = (side[BOX.key][:, level] / stride[level] for side in (ours, theirs))
        cls = cls + ((gap * entropy).sum(-1) * weight).sum() / average
        loc = loc + ((1 - aligned_giou(*boxes)) * gap.amax(-1) * weight).sum() / average
    torch.testing.assert_close(terms["cls"], cls)
    torch.testing.assert_close(terms["loc"], 4 * loc)


def test_which_anchors_are_ignored() -> None:
    batch = make_batch(RETINANET, [TWO])
    valid = batch.targets.valid.repeat_interleave(9, dim=1)
    between = (batch.targets.assigned == IGNORED) & valid
    assert between.any()  # RetinaNet: an IoU between .4 and .5
    ours, theirs = data(RETINANET, batch)
    terms = bckd(RETINANET, gate_levels=False)(ours, theirs, batch)
    (terms["cls"] + terms["loc"]).backward()
    for key in (CLASSES.key, BOX.key):
        gradient = ours[key].grad
        assert gradient is not None
        assert not gradient[between].any()
        assert not gradient[~valid].any()
        assert gradient[valid & ~between].any()


def test_the_gate() -> None:
    batch = make_batch(GFL, [torch.tensor([[10.0, 12.0, 30.0, 30.0]])])
    sizes = GFL.grid.level_sizes(batch.targets.canvas)
    positive = batch.targets.assigned >= 0
    gate = level_gate(positive, sizes)
    opened = [bool(level.any()) for level in positive.split(sizes, dim=1)]
    assert [bool(level.all()) for level in gate.split(sizes)] == opened
    assert [bool(level.any()) for level in gate.split(sizes)] == opened
    assert any(opened)
    assert not all(opened)
    ours, theirs = data(GFL, batch)
    gated, free = bckd()(ours, theirs, batch), bckd(gate_levels=False)(ours, theirs, batch)
    assert all(float(free[part].detach()) > float(gated[part].detach()) > 0 for part in gated)


def test_without_positives() -> None:
    batch = make_batch(GFL, [NONE, NONE])
    ours, theirs = data(GFL, batch)
    gated, free = bckd(), bckd(gate_levels=False)
    for part, term in gated(ours, theirs, batch).items():
        assert float(term.detach()) == 0
        assert term.requires_grad  # under DDP no parameter may go unused
        assert not gated.active(batch, part)
    for part, term in free(ours, theirs, batch).items():
        assert float(term.detach()) > 0
        assert free.active(batch, part)
    assert gated.active(make_batch(GFL, [NONE, ONE]), "cls")


def test_the_normaliser() -> None:
    positive = torch.tensor([[True, True, False], [False, False, False]])
    assert float(positives(positive, per_image=True)) == 3  # an image without positives counts as one
    assert float(positives(positive, per_image=False)) == 2
    assert float(positives(torch.zeros(2, 3, dtype=torch.bool), per_image=False)) == 1
    batch = make_batch(GFL, [TWO, NONE])
    specs = {**GFL.specs()}
    fcos = BCKD(Pair(specs, specs, GFL.grid, batch.targets.canvas, "fcos"))
    ours, theirs = data(GFL, batch)
    count = int((batch.targets.assigned >= 0).sum())
    anchor_head, points = bckd()(ours, theirs, batch), fcos(ours, theirs, batch)
    for part in ("cls", "loc"):
        torch.testing.assert_close(points[part], anchor_head[part] * (count + 1) / count)


def test_where_gradients_go() -> None:
    batch = make_batch(GFL, [TWO, ONE])
    ours, theirs = data(GFL, batch)
    theirs = {k: v.requires_grad_() for k, v in theirs.items()}
    terms = bckd()(ours, theirs, batch)
    boxes, logits = ours[BOX.key], ours[CLASSES.key]
    assert torch.autograd.grad(terms["cls"], [boxes], retain_graph=True, allow_unused=True)[0] is None
    # the weight of the box term is detached
    assert torch.autograd.grad(terms["loc"], [logits], retain_graph=True, allow_unused=True)[0] is None
    (terms["cls"] + terms["loc"]).backward()
    assert all(v.grad is not None and v.grad.any() and torch.isfinite(v.grad).all() for v in ours.values())
    assert all(v.grad is None for v in theirs.values())


@DETECTORS
def test_a_student_that_equals_its_teacher_has_no_loss(detector: Any) -> None:
    batch = make_batch(detector, [TWO, many_boxes(20)])
    ours, _ = data(detector, batch)
    terms = bckd(detector)(ours, {k: v.detach() for k, v in ours.items()}, batch)
    assert all(abs(float(t.detach())) < 1e-5 for t in terms.values())
    (terms["cls"] + terms["loc"]).backward()
    assert all(v.grad is None or v.grad.abs().max() < 1e-5 for v in ours.values())


def test_saturated_outputs_stay_finite() -> None:
    batch = make_batch(GFL, [TWO])
    ours, theirs = data(GFL, batch)
    ours[CLASSES.key] = (1e4 * ours[CLASSES.key].detach()).requires_grad_()
    ours[BOX.key] = torch.zeros_like(ours[BOX.key]).requires_grad_()  # without area
    for form in ("giou", "iou", "log_iou"):
        terms = bckd(iou=form)(ours, {k: -1e4 * v for k, v in theirs.items()}, batch)
        gradients = torch.autograd.grad(terms["cls"] + terms["loc"], list(ours.values()))
        assert all(torch.isfinite(t) for t in terms.values())
        assert all(torch.isfinite(g).all() for g in gradients)


def test_a_teacher_outside_the_valid_area_is_not_read() -> None:
    batch = make_batch(GFL, [TWO])
    ours, theirs = data(GFL, batch)
    changed = {k: v.clone() for k, v in theirs.items()}
    for value in changed.values():
        value[:, ~batch.targets.valid[0]] = 50.0
    before, after = (bckd(gate_levels=False)(ours, t, batch) for t in (theirs, changed))
    assert all(float(before[part].detach()) == float(after[part].detach()) for part in before)


@pytest.mark.parametrize("images", [2, 5])
def test_the_batch_size_does_not_change_a_term(images: int) -> None:
    batch = make_batch(GFL, [TWO])
    ours, theirs = data(GFL, batch)
    alone = bckd()(ours, theirs, batch)
    many = ({k: v.repeat(images, 1, 1) for k, v in side.items()} for side in (ours, theirs))
    together = bckd()(*many, make_batch(GFL, [TWO] * images))
    for part, term in together.items():
        torch.testing.assert_close(term, alone[part], rtol=1e-5, atol=0)


@DETECTORS
@pytest.mark.parametrize("halves", [[TWO, NONE, ONE, many_boxes(9)], [NONE, NONE, TWO, ONE]], ids=["mixed", "empty"])
def test_two_processes_agree_with_one(detector: Any, halves: list[Tensor]) -> None:
    whole = make_batch(detector, halves)
    ours, theirs = data(detector, whole)
    method = bckd(detector)

    def half(order: list[int]) -> dict[str, Tensor]:
        student, teacher = ({k: v[order] for k, v in side.items()} for side in (ours, theirs))
        result: dict[str, Tensor] = method(student, teacher, take(whole, order))
        return result

    one, two = method(ours, theirs, whole), on_two_processes(lambda: half([0, 1]), lambda: half([2, 3]))
    for part, term in one.items():
        torch.testing.assert_close(two[part], term, rtol=1e-5, atol=0)


def test_options() -> None:
    batch = make_batch(GFL, [TWO])
    ours, theirs = data(GFL, batch)
    once = bckd()(ours, theirs, batch)
    thrice = bckd(cls_weight=3, loc_weight=12)(ours, theirs, batch)
    for part, term in once.items():
        torch.testing.assert_close(thrice[part], 3 * term)
        assert bckd().weight_option(part) == f"{part}_weight"
    assert set(bckd(cls_weight=0)(ours, theirs, batch)) == {"loc"}
    assert set(bckd(loc_weight=0)(ours, theirs, batch)) == {"cls"}
    others = [bckd(**o)(ours, theirs, batch) for o in ({"iou": "iou"}, {"iou": "log_iou"}, {"beta": 2.0})]
    assert len({round(float(t["cls"].detach() + t["loc"].detach()), 5) for t in [once, *others]}) == 4
    with pytest.raises(OptionError, match="at least 1"):
        bckd(beta=0.5)


@pytest.mark.parametrize(
    ("detector", "given", "said"),
    [
        ("gfl", {}, ""),
        ("retinanet", {}, "cls_weight 1 and loc_weight 1 are those of CrossKD for retinanet"),
        ("atss", {}, "cls_weight 1 and loc_weight 1 are those of CrossKD for atss"),
        ("fcos", {"iou": "iou"}, "cls_weight 0.4 and loc_weight 0.75 are those of CrossKD for fcos"),
        ("mine", {}, "cls_weight 1 and loc_weight 4 are those for gfl"),  # a plugin's
        ("atss", {"loc_weight": 4.0}, ""),  # a weight of the user's own needs no warning
    ],
)
def test_default_weights_off_gfl_are_crosskds(detector: str, given: dict[str, Any], said: str) -> None:
    """CrossKD's configurations: KDQualityFocalLoss 1, GIoULoss 1 on RetinaNet and ATSS; 0.4 and IoULoss 0.75 on FCOS."""
    warning = BCKD.warning(detector, resolve_options("bckd", BCKD, detector, given), 80)
    assert bool(warning) == bool(said)
    assert said in (warning or "")


def test_what_it_reads() -> None:
    assert {n.name for n in BCKD.needs} == {CLS_LOGITS, BOXES}
    assert all(n.dense for n in BCKD.needs)
    assert list(bckd().parameters()) == []
    batch = make_batch(GFL, [TWO])
    ours, theirs = data(GFL, batch)
    bckd()(ours, theirs, replace(batch, entries=None))


def test_score_gap() -> None:
    student, teacher = torch.tensor([[0.0, 3.0]], requires_grad=True), torch.tensor([[2.0, 3.0]])
    gap = score_gap(student, teacher)
    assert float(gap) == pytest.approx(0.880797 - 0.5, abs=1e-6)
    assert not gap.requires_grad
