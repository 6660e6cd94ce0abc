"""Single published or measured values that no reference file holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdcli.detectors.dense.losses import gfl_loss
from kdcli.geometry.defeat_mask import box_levels, defeat_cells
from kdcli.geometry.grid import Grid
from kdcli.methods.bckd import bckd_cls, bckd_loc
from kdcli.methods.decoupled import decoupled_imitation
from kdcli.methods.defeat import decoupled_kl
from kdcli.methods.divergence import kl_rows
from kdcli.structures import Canvas
from tests.support.golden.case import ANCHOR_GRID, ATSS, Arrays, Case, canvas_of, flat, leaves, make_targets


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.10544483), (10.0, 0.65834272)])
def test_kl_of_an_edge(temperature: float, expected: float) -> None:
    student, teacher = torch.zeros(1, 17), torch.arange(17.0)[None]
    row = kl_rows(student, teacher, temperature)
    assert float(row) == pytest.approx(expected, rel=1e-6)
    if temperature == 10.0:
        assert float(0.25 * row / 4) == pytest.approx(0.04114642, rel=1e-6)  # as main LD: weight .25, 4 edges


@pytest.mark.parametrize(("eps", "expected"), [(None, 0.1446), (1e-6, 1.617)])
def test_normaliser_of_low_scores(eps: float | None, expected: float) -> None:
    # batch B with class logits lowered by 7: mmdet's GFLHead clamps the sum of scores at 1, its LDHead adds 1e-6
    case = Case(Path(__file__).parent / "cases", "gfl_B_lowscore", "B", Arrays({}))
    inputs = case.file("inputs_student")
    cls, box = leaves(inputs, "cls", case.cls_shift()), leaves(inputs, "bbox")
    targets = make_targets(case, "B", canvas_of(inputs), ANCHOR_GRID, ATSS)
    losses = gfl_loss(flat(cls, (20,)), flat(box, (4, 17)), targets, ANCHOR_GRID, eps=eps)
    assert float(losses["loss_bbox"].detach()) == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize(
    ("detach_factor", "expected"),
    [
        (False, [[-0.13166331, -0.10915331, -0.07656651], [-0.05866597, 0.04888927, 0.03475255]]),
        (True, [[-0.07250321, -0.04206649, -0.01097019], [-0.00010695, 0.00158032, 0.00156027]]),
    ],
)
def test_bckd_class_loss(detach_factor: bool, expected: list[list[float]]) -> None:
    k = torch.arange(6, dtype=torch.float64)
    student = ((0.5 * k).sin() - 2).reshape(2, 3).requires_grad_()
    teacher = ((0.5 * k).cos() - 1).reshape(2, 3)
    loss = bckd_cls(student, teacher, torch.ones(2), detach_factor=detach_factor).sum() / 2
    assert float(loss.detach()) == pytest.approx(0.4303764921, rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


def test_bckd_box_loss() -> None:
    student = torch.tensor([[0.0, 0, 4, 4], [0, 0, 2, 2]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 1, 5, 5], [3, 3, 5, 5]], dtype=torch.float64)
    rows = bckd_loc(student, teacher, torch.ones(2, dtype=torch.float64))
    assert (1 - rows).tolist() == pytest.approx([0.3113043, -0.68], abs=1e-7)
    weight = torch.tensor([0.5, 0.2], dtype=torch.float64)
    assert float(4 * bckd_loc(student, teacher, weight).sum() / 2) == pytest.approx(1.3606956522, rel=1e-9)
    linear = 4 * bckd_loc(student, teacher, weight, "iou").sum() / 2
    # mmdet takes an IoU of 0 for 1e-6: 4e-7 less
    assert float(linear) == pytest.approx(1.0086956522, rel=1e-6)


def test_defeat_levels_and_mask() -> None:
    sides = [110.0, 111.0, 223.0, 447.0, 895.0]
    assert box_levels(torch.tensor([[0.0, 0, s, s] for s in sides]), 5).tolist() == [0, 1, 2, 3, 4]
    boxes = torch.tensor([[10.0, 10, 50, 60], [3, 3, 5, 30]])
    mask = defeat_cells(boxes, Grid(strides=(4,)), Canvas(64, 64)).reshape(16, 16)
    assert int(mask.sum()) == 137
    assert torch.nonzero(mask.any(dim=1))[:, 0].tolist() == list(range(15))
    assert not mask[:, 1].any()
    assert mask[:, 0].any()


@pytest.mark.parametrize(("fg", "bg", "expected"), [(4, 16, 4.0), (3, 12, 3.0)])
def test_defeat_neck_terms(fg: float, bg: float, expected: float) -> None:
    mask = defeat_cells(torch.tensor([[10.0, 10, 50, 60], [3, 3, 5, 30]]), Grid(strides=(4,)), Canvas(64, 64))[None]
    teacher = torch.where(mask, 1.0, 0.5)  # in both channels; the student is 0
    foreground, background = decoupled_imitation([teacher.square()], [mask], [torch.ones_like(mask)])
    assert (float(foreground), float(background)) == (0.5, 0.125)
    assert float(fg * foreground + bg * background) == expected


@pytest.mark.parametrize(
    ("temperature", "positive", "negative"), [(1.0, 0.2799510, 0.0927526), (2.0, 0.4194314, 0.2533582)]
)
def test_defeat_class_terms(temperature: float, positive: float, negative: float) -> None:
    student = torch.tensor([[1.0, 0, -1], [0, 0, 2], [0.5, 0.5, 0]], dtype=torch.float64)
    teacher = torch.tensor([[3.0, 0, -1], [0, -1, 3], [0, 2, 0]], dtype=torch.float64)
    parts = decoupled_kl(student, teacher, torch.tensor([0, 2, 1]), 2, temperature, temperature)
    assert [float(p) for p in parts] == pytest.approx([positive, negative], abs=1e-7)
