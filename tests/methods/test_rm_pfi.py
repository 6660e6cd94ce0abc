"""RM and PFI: hand-computed values of their pure functions and the choices that their options stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcli.methods.base import Method
from kdcli.methods.pfi import CLASSES, MAPS, PFI, WEIGHT, Form, imitation_loss, prediction_difference
from kdcli.methods.resolve import resolve_options
from kdcli.methods.rm import RANKS, RM, rank_loss
from kdcli.structures import Batch
from kdcli.tensors import Tensors
from tests.support.method_case import (
    NONE,
    ONE,
    TWO,
    detector_of,
    inputs,
    make_batch,
    make_outputs,
    many_boxes,
    pair_of,
)

EXACT = 1e-6  # relative
GFL = detector_of("gfl")
ONE_GROUP = torch.zeros(4, dtype=torch.int64)


def scores() -> tuple[Tensor, Tensor]:
    """Class logits, student and teacher, of four positives of one box."""
    return (
        torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64),
        torch.tensor([2.0, 0.5, -1.0, 0.0], dtype=torch.float64),
    )


def test_rank_loss_values() -> None:
    student, teacher = scores()
    ranks = rank_loss(student.sigmoid(), teacher.sigmoid(), ONE_GROUP, 1)
    assert float(ranks) == pytest.approx(0.0236317898, rel=EXACT)
    raw = rank_loss(student, teacher, ONE_GROUP, 1)
    assert float(raw) == pytest.approx(0.6971443907, rel=EXACT)
    in_order = rank_loss(student.sigmoid(), teacher.sigmoid(), ONE_GROUP, 1, sort=True)
    assert float(in_order) == pytest.approx(0.0024492401, rel=EXACT)
    iou = torch.tensor([[0.6, 0.8, 0.7], [0.9, 0.5, 0.7]], dtype=torch.float64)
    assert float(rank_loss(iou[0], iou[1], ONE_GROUP[:3], 1)) == pytest.approx(0.0297770394, rel=EXACT)


def test_a_single_candidate_has_no_rank() -> None:
    student = torch.tensor([0.3], requires_grad=True)
    loss = rank_loss(student, torch.tensor([0.9]), ONE_GROUP[:1], 1)
    assert float(loss.detach()) == 0
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() == 0


def test_groups_are_apart() -> None:
    torch.manual_seed(0)
    student, teacher = torch.rand(9, dtype=torch.float64), torch.rand(9, dtype=torch.float64)
    group = torch.tensor([2, 0, 2, 4, 0, 4, 4, 2, 5])  # unsorted; 1 and 3 are empty, 5 has one
    for sort in (False, True):
        loss = rank_loss(student, teacher, group, 7, sort=sort)
        assert loss.shape == (7,)
        for g in range(7):
            mine = group == g
            ours, theirs = student[mine], teacher[mine]
            if sort:
                ours, theirs = ours.sort().values, theirs.sort().values
            alone = (theirs.softmax(0) * (theirs.log_softmax(0) - ours.log_softmax(0))).sum()
            assert float(loss[g]) == pytest.approx(float(alone), rel=EXACT, abs=1e-15)


def test_rank_loss_of_nothing() -> None:
    nothing = torch.zeros(0, requires_grad=True)
    for groups in (0, 3):
        loss = rank_loss(nothing, torch.zeros(0), torch.zeros(0, dtype=torch.int64), groups)
        assert loss.tolist() == [0.0] * groups
        loss.sum().backward()


def method_inputs(method: type[Method], batch: Batch) -> tuple[Tensors, Tensors]:
    ours, theirs = (make_outputs(GFL, len(batch.keys), seed) for seed in (1, 2))
    return inputs(GFL, ours, method.needs, batch), inputs(GFL, theirs, method.needs, batch)


def rm(**options: Any) -> RM:
    return RM(pair_of(GFL, GFL), **options)


def test_rm_is_a_mean_over_boxes_then_images() -> None:
    batch = make_batch(GFL, [TWO, NONE, ONE])
    ours, theirs = method_inputs(RM, batch)
    terms = rm()(ours, theirs, batch)
    assert list(terms) == ["cls", "loc"]
    assert batch.entries is not None
    main = batch.entries.select("main")
    image, gt = batch.entries.image[main], batch.entries.gt[main]
    for column, part in enumerate(("cls", "loc")):
        means = []
        for i, boxes in enumerate((2, 0, 1)):
            found = []
            for g in range(boxes):
                mine = (image == i) & (gt == g)
                assert mine.sum() > 1
                mine_ours, mine_theirs = (side[RANKS.key][mine, column] for side in (ours, theirs))
                found.append(rank_loss(mine_ours, mine_theirs, gt[mine] * 0, 1)[0])
            means.append(torch.stack(found).mean() if found else torch.zeros(()))
        torch.testing.assert_close(terms[part], 4.0 * torch.stack(means).mean())


def test_rm_options() -> None:
    batch = make_batch(GFL, [TWO])
    ours, theirs = method_inputs(RM, batch)
    plain = rm()(ours, theirs, batch)
    assert set(rm(cls=0)(ours, theirs, batch)) == {"loc"}
    assert set(rm(loc=0)(ours, theirs, batch)) == {"cls"}
    assert rm(weight=0)(ours, theirs, batch) == {}
    torch.testing.assert_close(rm(cls=0.5)(ours, theirs, batch)["cls"], 0.5 * plain["cls"])
    torch.testing.assert_close(rm(weight=1)(ours, theirs, batch)["loc"], plain["loc"] / 4)
    in_order = rm(sorted_scores=True)(ours, theirs, batch)
    for part, term in plain.items():
        assert 0 <= in_order[part] < term  # the order is what a sorted comparison forgets
    halved = [{RANKS.key: side[RANKS.key] / 2} for side in (ours, theirs)]
    torch.testing.assert_close(rm(temperature=2)(ours, theirs, batch), rm()(*halved, batch))


def test_rm_ranks_only_within_a_box() -> None:
    # raising every score of one box by the same amount changes no rank
    batch = make_batch(GFL, [TWO])
    ours, theirs = method_inputs(RM, batch)
    assert batch.entries is not None
    first = (batch.entries.gt[batch.entries.select("main")] == 0).float()[:, None]
    moved = {RANKS.key: ours[RANKS.key] + 0.3 * first}
    torch.testing.assert_close(rm()(moved, theirs, batch), rm()(ours, theirs, batch), rtol=1e-4, atol=1e-7)


def test_rm_is_active_with_two_positives_of_one_box() -> None:
    assert rm().active(make_batch(GFL, [TWO]), "cls")
    assert not rm().active(make_batch(GFL, [NONE, NONE]), "cls")
    batch = make_batch(GFL, [ONE, ONE])
    assert batch.entries is not None
    apart = batch.entries.gt * 0
    single = [int((batch.entries.image == i).nonzero()[0]) for i in (0, 1)]
    flag = torch.zeros_like(batch.entries.flag)
    flag[single] = 1  # one positive in each image: nothing to rank
    entries = type(batch.entries)(batch.entries.index, flag, apart, batch.entries.weight, batch.entries.image)
    assert not rm().active(Batch(batch.images, batch.targets, batch.keys, entries), "cls")


Z_T = torch.tensor([[[2.0, -2.0], [0.0, 0.0]]], dtype=torch.float64)
Z_S = torch.tensor([[[0.0, -2.0], [1.0, -1.0]]], dtype=torch.float64)
F_DIF = torch.tensor([[4 / 3, 1.0]], dtype=torch.float64)  # of features (1 2 3), (0 0 0) and (1 0 3), (1 1 1)
VALID = torch.ones(1, 2, dtype=torch.bool)


def test_prediction_difference_values() -> None:
    assert prediction_difference(Z_S, Z_T, 2, space="logit").tolist() == [[4.0, 2.0]]
    prob = prediction_difference(Z_S, Z_T, 2)[0]
    assert prob.tolist() == pytest.approx([2 * 0.0725032, 2 * 0.0533881], rel=1e-5)


@pytest.mark.parametrize(
    ("space", "form", "expected"),
    [
        # of two outputs, so that a sum is twice their mean
        ("logit", "squared", 2**2 * 4.0555556),
        ("logit", "linear", 2 * 1.8333333),
        ("prob", "squared", 2**2 * 0.0060977785),
        ("prob", "linear", 2 * 0.0750295049),
        ("prob", "norm", 2 * 0.0552167477),
    ],
)
def test_imitation_loss_values(space: Any, form: Form, expected: float) -> None:
    loss = imitation_loss(prediction_difference(Z_S, Z_T, 2, space=space), F_DIF, VALID, [2], form=form)
    assert loss.shape == (1,)
    assert float(loss) == pytest.approx(expected, rel=EXACT)


def test_the_levels_are_averaged_and_invalid_cells_are_in_neither_sum_nor_count() -> None:
    p_dif = torch.tensor([[1.0, 2.0, 3.0, 9.0]], dtype=torch.float64)
    f_dif = torch.ones(1, 4, dtype=torch.float64)
    valid = torch.tensor([[True, True, True, False]])
    assert float(imitation_loss(p_dif, f_dif, valid, [2, 2], form="linear")) == pytest.approx((1.5 + 3) / 2)
    assert float(imitation_loss(p_dif, f_dif, valid, [2, 2])) == pytest.approx((2.5 + 9) / 2)
    # a level without a valid cell gives 0 and still counts among the levels
    assert float(imitation_loss(p_dif, f_dif, valid, [3, 1], form="linear")) == pytest.approx((2 + 0) / 2)


@pytest.mark.parametrize("form", ["squared", "linear", "norm"])
def test_a_level_without_valid_cells_has_a_finite_gradient(form: Form) -> None:
    p_dif = torch.rand(2, 4, requires_grad=True)
    valid = torch.tensor([[True, True, False, False], [False] * 4])
    imitation_loss(p_dif, torch.rand(2, 4), valid, [2, 2], form=form).sum().backward()
    assert p_dif.grad is not None
    assert torch.isfinite(p_dif.grad).all()
    assert not p_dif.grad[~valid].any()


def test_several_anchors_share_a_cell() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6 * 9, 3), torch.randn(2, 6 * 9, 3)
    found = prediction_difference(student, teacher, 6)
    by_hand = (student.sigmoid() - teacher.sigmoid()).square().reshape(2, 6, 27).sum(dim=-1)
    torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize("anchors", [1, 9])
@pytest.mark.parametrize("classes", [1, 3, 20, 80])
def test_the_scale_of_pfi_at_every_number_of_outputs(classes: int, anchors: int) -> None:
    """The loss cell by cell in numpy. At 3 classes and one anchor it is that of the mean with the weight 1.5; a class that
    neither net believes in changes nothing, where the mean made the loss of ten times the outputs a hundredth."""
    draw = np.random.default_rng(classes * anchors)
    student, teacher = draw.normal(-1, 2, (2, 1, 4 * anchors, classes))
    features = draw.random((1, 4))
    p, q = (1 / (1 + np.exp(-z)) for z in (student, teacher))
    total = np.zeros(4)
    for cell in range(4):
        for a in range(anchors):
            total[cell] += sum((p[0, cell * anchors + a, c] - q[0, cell * anchors + a, c]) ** 2 for c in range(classes))
    expected = sum((total[cell] * features[0, cell]) ** 2 for cell in range(4)) / 4

    def loss(extra: int) -> float:
        sides = [np.concatenate([z, np.full((1, 4 * anchors, extra), -40.0)], axis=2) for z in (student, teacher)]
        p_dif = prediction_difference(*(torch.from_numpy(z) for z in sides), 4)
        valid = torch.ones(1, 4, dtype=torch.bool)
        return float(imitation_loss(p_dif, torch.from_numpy(features), valid, [4]))

    assert loss(0) == pytest.approx(expected, rel=1e-12)
    assert loss(9 * classes) == pytest.approx(expected, rel=1e-12)
    outputs = anchors * classes
    assert WEIGHT * loss(0) == pytest.approx(1.5 * expected / outputs**2 * (outputs / 3) ** 2, rel=1e-12)


def pfi(**options: Any) -> PFI:
    return PFI(pair_of(GFL, GFL), **options)


@pytest.mark.parametrize("form", ["squared", "linear", "norm"])
@pytest.mark.parametrize("space", ["prob", "logit"])
def test_pfi_is_its_parts(space: Any, form: Form) -> None:
    batch = make_batch(GFL, [TWO, NONE])
    ours, theirs = method_inputs(PFI, batch)
    cells = batch.targets.valid.shape[1]
    p_dif = prediction_difference(ours[CLASSES.key], theirs[CLASSES.key], cells, space=space)
    f_dif = (ours[MAPS.key] - theirs[MAPS.key]).square().mean(dim=-1)
    sizes = GFL.grid.level_sizes(batch.targets.canvas)
    expected = 1.5 / 9 * imitation_loss(p_dif, f_dif, batch.targets.valid, sizes, form=form).mean()
    terms = pfi(pred_space=space, form=form)(ours, theirs, batch)
    assert list(terms) == ["loss"]
    torch.testing.assert_close(terms["loss"], expected)


@pytest.mark.parametrize("detach", [False, True])
def test_detaching_the_weight_of_pfi(detach: bool) -> None:
    batch = make_batch(GFL, [many_boxes(3)])
    ours, theirs = method_inputs(PFI, batch)
    loss = pfi(detach_pdif=detach)(ours, theirs, batch)["loss"]
    (gradient,) = torch.autograd.grad(loss, [ours[CLASSES.key]], allow_unused=True)
    assert (gradient is None) == detach


def test_the_adapter_maps_student_channels_to_the_teachers() -> None:
    wide = PFI(pair_of(detector_of("gfl", 64), GFL))
    (weight,) = wide.parameters()
    assert weight.shape == (32, 64)  # a 1x1 convolution, no bias
    assert weight.requires_grad


@pytest.mark.parametrize(
    ("options", "said"),
    [({}, False), ({"weight": 1.5}, True), ({"weight": 0.9}, False), ({"weight": 1.5, "form": "linear"}, False),
     ({"weight": 1.5, "pred_space": "logit"}, False)],
)  # fmt: skip
def test_a_weight_for_the_mean_is_noticed(options: dict[str, Any], said: bool) -> None:
    warning = PFI.warning("gfl", resolve_options("pfi", PFI, "gfl", options), 3)
    assert (warning is not None) == said
    if warning is not None:
        assert "weight 1.5 is 9 times the default, 0.167" in warning
