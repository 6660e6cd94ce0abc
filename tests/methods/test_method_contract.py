"""What every method must do on every detector it works on; a new method or detector is tested by being listed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdcli.errors import OptionError
from kdcli.methods import METHODS
from kdcli.methods.base import Method, method_options
from kdcli.methods.defeat import WEIGHT_OPTIONS
from kdcli.methods.resolve import resolve_options
from kdcli.tensors import (
    BOXES,
    CLS_LOGITS,
    FEATURES,
    GT_ROIS,
    PROPOSAL_BOXES,
    PROPOSAL_LABELS,
    PROPOSAL_LOGITS,
    RANK,
    Need,
)
from tests.support.method_case import (
    CANVAS,
    CASES,
    EVERY,
    NAMES,
    NONE,
    ONE,
    STUDENT,
    TEACHER,
    TWO,
    VARIANT_CASES,
    both_sides,
    build,
    detector_of,
    every,
    first_image,
    make_batch,
    make_outputs,
    many_boxes,
    on_gfl,
    outside_of,
    resolved,
    student_needs,
    take,
    terms_of,
    total,
)
from tests.support.selection import matrix

SCENES = {
    "one box": [ONE],
    "two boxes": [TWO],
    "empty": [NONE],
    "all empty": [NONE, NONE],
    "empty and full": [NONE, TWO],
    "300 boxes": [many_boxes(300)],
    "tiny box": [torch.tensor([[40.2, 33.1, 41.3, 34.2]])],
    "whole image": [torch.tensor([[0.0, 0.0, 120.0, 60.0]])],
}

# these train modules on the teacher's side, or an adapter whatever the channels: equal nets do not give 0
TRAINED = {"drkd", "drkd_lite", "defeat", "defeat_thin"}
BACKGROUND = ("object+sample", "proposals")  # regions that are not empty where no box is
DENSE = {"gfl", "retinanet", "atss", "fcos", "retinanet+distribution", "atss+distribution", "fcos+distribution"}


def weights(method: Method, terms: dict[str, Tensor]) -> set[str]:
    """The options that scale its terms."""
    return {method.weight_option(part) for part in terms}


def scaled_by(method: Method, part: str) -> set[str]:
    """The options that scale one term: DeFeat's backbone_weight multiplies the neck's two."""
    neck = {WEIGHT_OPTIONS[part.removeprefix("backbone_")]} if part.startswith("backbone_") else set()
    return {method.weight_option(part)} | neck


LD_VARIANTS = ("fine_grained", "gi", "fitnet", "inside_gt", "main", "defeat", "joint", "vlr_kd")


def test_which_methods_work_where() -> None:
    ld = {"gfl", "retinanet+distribution", "atss+distribution", "fcos+distribution"}
    anywhere = {"defeat", "drkd", "drkd_lite", "cwd", "pkd", "fgd", "defeat_thin"}
    expected = {("ld", d) for d in ld} | {(m, d) for m in ("rm", "pfi", "bckd") for d in DENSE}
    expected |= {(m, d) for m in anywhere for d in DENSE | {"faster_rcnn"} if d in NAMES}
    assert set(CASES) == expected
    variants = {(f"ld:{v}", d) for v in LD_VARIANTS for d in ld}
    variants |= {("defeat:backbone", d) for d in NAMES} | {("defeat:proposals", "faster_rcnn")}
    assert set(VARIANT_CASES) == variants


@every
@pytest.mark.parametrize("scene", SCENES)
def test_terms_are_finite_scalars_with_a_graph(name: str, detector: str, scene: str) -> None:
    student, boxes = detector_of(detector), SCENES[scene]
    batch = make_batch(student, boxes)
    ours, theirs = make_outputs(student, len(boxes), STUDENT), make_outputs(student, len(boxes), TEACHER)
    method = build(name, detector)
    terms = terms_of(method, student, ours, theirs, batch)
    assert terms
    for part, term in terms.items():
        assert term.shape == (), part
        assert term.dtype == torch.float32
        assert torch.isfinite(term)
        assert term >= -1e-6
        assert term.requires_grad  # also for an empty image: under DDP no parameter may go unused
        if not any(n.dense or n.region in BACKGROUND for n in method.needs) and not any(len(b) for b in boxes):
            assert term == 0
    total(terms).backward()
    for output in ours.values():
        assert output.grad is None or torch.isfinite(output.grad).all()
    for part, term in terms.items():
        assert method.active(batch, part) or term == 0, part  # a term that can differ from 0 must be watched
        if scene == "two boxes":
            assert method.active(batch, part), part


# which outputs a derived tensor is computed from
READ_FROM = {
    RANK: (CLS_LOGITS, "box"),
    BOXES: ("box",),
    GT_ROIS: (FEATURES,),
    PROPOSAL_BOXES: (),
    PROPOSAL_LOGITS: (FEATURES,),
}


@every
def test_gradients_reach_the_student_and_never_the_teacher(name: str, detector: str) -> None:
    student = detector_of(detector)
    batch = make_batch(student, [TWO, ONE])
    ours, theirs = make_outputs(student, 2, STUDENT), make_outputs(student, 2, TEACHER)
    method = build(name, detector)
    total(terms_of(method, student, ours, theirs, batch)).backward()
    for need in student_needs(method):
        if name.startswith("ld") and need.name == CLS_LOGITS and need.region == "main+vlr":
            continue  # the scores that weigh the VLR on FCOS are detached
        if need.name in (CLS_LOGITS, BOXES) and name == "ld:gi" and need.dense:
            continue  # they choose anchors
        for output in (student.box_name if part == "box" else part for part in READ_FROM.get(need.name, (need.name,))):
            gradient = ours[output].grad
            assert gradient is not None, output
            assert gradient.abs().sum() > 0, output
    assert all(output.grad is None for output in theirs.values())


@every
def test_a_method_reads_its_needs_and_nothing_else(name: str, detector: str) -> None:
    student = detector_of(detector)
    batch = make_batch(student, [TWO])
    method = build(name, detector)
    outputs = make_outputs(student, 1, STUDENT), make_outputs(student, 1, TEACHER)
    ours, theirs = both_sides(method, student, outputs[0], student, outputs[1], batch)
    method(ours, theirs, batch)  # batch.images and batch.rows are empty
    boxes = Need(PROPOSAL_BOXES, "proposals")  # the step reads these, and hands over the labels of those it has drawn
    assert ours.used == {n.key for n in student_needs(method) if n != boxes}
    labels = {PROPOSAL_LABELS} if boxes in method.needs else set()
    assert theirs.used == {n.key for n in method.needs if n != boxes} | labels


@pytest.mark.parametrize(
    ("name", "detector"), matrix([case for case in EVERY if case[0].partition(":")[0] not in TRAINED], on_gfl)
)
def test_a_student_that_equals_its_teacher_has_no_loss(name: str, detector: str) -> None:
    student = detector_of(detector)
    batch = make_batch(student, [TWO, many_boxes(20)])
    ours = make_outputs(student, 2, STUDENT)
    same = {k: v.detach().clone() for k, v in ours.items()}
    terms = terms_of(build(name, detector), student, ours, same, batch)
    for term in terms.values():
        assert float(term.detach()) == pytest.approx(0, abs=1e-5)
    total(terms).backward()
    assert all(v.grad is None or v.grad.abs().max() < 1e-5 for v in ours.values())


@every
@pytest.mark.parametrize("images", [2, 5])
def test_the_batch_size_does_not_change_a_term(name: str, detector: str, images: int) -> None:
    student = detector_of(detector)
    ours, theirs = make_outputs(student, 1, STUDENT), make_outputs(student, 1, TEACHER)
    method = build(name, detector)
    alone = terms_of(method, student, ours, theirs, make_batch(student, [TWO]))
    many = first_image(ours, images), first_image(theirs, images)
    together = terms_of(method, student, *many, make_batch(student, [TWO] * images))
    assert together.keys() == alone.keys()
    for part, term in together.items():
        # abs: a divergence of 8e-4 is what is left of log-probabilities of up to 5, each rounded by 2e-7
        assert float(term.detach()) == pytest.approx(float(alone[part].detach()), rel=1e-5, abs=1e-7), part


@every
def test_the_order_of_images_does_not_change_a_term(name: str, detector: str) -> None:
    student, order = detector_of(detector), [2, 0, 1]
    batch = make_batch(student, [TWO, NONE, many_boxes(12)])
    ours, theirs = make_outputs(student, 3, STUDENT), make_outputs(student, 3, TEACHER)
    method = build(name, detector)
    before = terms_of(method, student, ours, theirs, batch)
    ours, theirs = ({k: v[order] for k, v in outputs.items()} for outputs in (ours, theirs))
    after = terms_of(method, student, ours, theirs, take(batch, order))
    for part, term in after.items():
        assert float(term.detach()) == pytest.approx(float(before[part].detach()), rel=1e-5), part


# a RoI head reads beyond the content where a proposal touches its edge, as it does in training and inference
@pytest.mark.parametrize(
    ("name", "detector"), matrix([case for case in EVERY if case[0] != "defeat:proposals"], on_gfl)
)
def test_invalid_cells_are_never_read(name: str, detector: str) -> None:
    student = detector_of(detector)
    batch = make_batch(student, [TWO])
    ours, theirs = make_outputs(student, 1, STUDENT), make_outputs(student, 1, TEACHER)
    method = build(name, detector)
    before = total(terms_of(method, student, ours, theirs, batch))
    outside = ~batch.targets.valid[0]
    assert outside.any()
    changed = {}
    for key, value in theirs.items():
        mask = outside_of(student, batch, key)
        changed[key] = value.detach().clone()
        changed[key][:, mask] = 50.0
    after = total(terms_of(method, student, ours, changed, batch))
    assert float(after.detach()) == float(before.detach())
    after.backward()
    for key, value in ours.items():
        mask = outside_of(student, batch, key)
        assert value.grad is None or not value.grad[:, mask].any(), key


@every
def test_a_term_of_weight_0_is_absent(name: str, detector: str) -> None:
    student = detector_of(detector)
    batch = make_batch(student, [TWO])
    outputs = make_outputs(student, 1, STUDENT), make_outputs(student, 1, TEACHER)
    method = build(name, detector)
    terms = terms_of(method, student, *outputs, batch)
    options = weights(method, terms)
    for option in options if len(options) > 1 else ():
        left = terms_of(build(name, detector, **{option: 0.0}), student, *outputs, batch)
        assert set(left) == {part for part in terms if option not in scaled_by(method, part)}
    with pytest.raises(OptionError, match=f"method '{name.partition(':')[0]}' has no term"):
        build(name, detector, **dict.fromkeys(options, 0.0))


@every
def test_terms_scale_with_their_weight(name: str, detector: str) -> None:
    student = detector_of(detector)
    batch = make_batch(student, [TWO])
    outputs = make_outputs(student, 1, STUDENT), make_outputs(student, 1, TEACHER)
    torch.manual_seed(0)
    method = build(name, detector)
    once = terms_of(method, student, *outputs, batch)
    default = resolved(name, detector)
    torch.manual_seed(0)  # the same adapters
    more = build(name, detector, **{option: 3 * default[option] for option in weights(method, once)})
    many = terms_of(more, student, *outputs, batch)
    for part, term in once.items():
        factor = 3 ** len(scaled_by(method, part))
        assert float(many[part].detach()) == pytest.approx(factor * float(term.detach()), rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_where_it_comes_from(name: str) -> None:
    method = METHODS[name]
    assert "arXiv" in method.title
    assert method.__doc__ is not None
    for option in method_options(method):
        assert f"``{option}``" in method.__doc__, option
    assert set(method.region_options) <= set(method_options(method))
    needs = method.reads(resolve_options(name, method, "gfl", {}))
    assert len(set(needs)) == len(needs)


def test_the_scenes_are_what_they_say() -> None:
    batch = make_batch(detector_of("gfl"), SCENES["300 boxes"])
    assert len(batch.targets.boxes[0]) == 300
    assert batch.entries is not None
    assert batch.entries.select("main").any()
    assert batch.entries.select("vlr").any()
    assert batch.targets.canvas == CANVAS
