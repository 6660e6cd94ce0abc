"""Single published or measured values that no reference file holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_case import ANCHOR_GRID, ATSS, Case, canvas_of, flat, leaves, make_targets

from kdcli.detectors.dense.losses import gfl_loss
from kdcli.methods.divergence import kl_rows


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
    case = Case(Path(__file__).parent / "cases", "gfl_B_lowscore", "B", {})
    inputs = case.file("inputs_student")
    cls, box = leaves(inputs, "cls", case.cls_shift()), leaves(inputs, "bbox")
    targets = make_targets(case, "B", canvas_of(inputs), ANCHOR_GRID, ATSS)
    losses = gfl_loss(flat(cls, (20,)), flat(box, (4, 17)), targets, ANCHOR_GRID, eps=eps)
    assert float(losses["loss_bbox"].detach()) == pytest.approx(expected, rel=5e-4)
