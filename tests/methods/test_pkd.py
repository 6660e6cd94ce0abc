"""PKD against numpy's correlation coefficient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcli.errors import OptionError
from kdcli.methods.pkd import PKD, pearson_loss, standardise
from kdcli.methods.resolve import resolve_options
from tests.support.feature_case import GRID, TWO, check_common, grad, make_batch, make_pair, maps, number, run


def test_pkd_does_what_every_method_must() -> None:
    check_common(PKD)


def test_a_level_is_one_minus_pearsons_r() -> None:
    student, teacher = maps(2, 3, 1)[:, :6].double(), (maps(2, 3, 2)[:, :6] * 5 + 9).double()
    valid = torch.tensor([[True] * 6, [True, True, False, True, False, False]])
    a, b = student[valid].detach().numpy(), teacher[valid].detach().numpy()
    r = [np.corrcoef(a[:, c], b[:, c])[0, 1] for c in range(3)]
    assert number(pearson_loss(student, teacher, valid)) == pytest.approx(1 - np.mean(r), rel=1e-9)


def test_standardised_maps_have_mean_0_and_deviation_1() -> None:
    value = maps(2, 3)[:, :10] * 4 + 100
    found = standardise(value, torch.ones(2, 10, 1)).flatten(0, 1)
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std(dim=0, correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_scale_and_shift_of_the_teacher_cost_nothing() -> None:
    batch, ours = make_batch([TWO, TWO]), maps(2)
    assert number(run(PKD(make_pair()), ours, ours.detach() * 3 - 2, batch)["loss"]) == pytest.approx(0, abs=1e-5)


def test_pkd_sums_the_four_finest_levels() -> None:
    batch = make_batch([TWO, TWO])
    ours, theirs = maps(2, seed=1), maps(2, seed=2)
    sizes = [h * w for h, w in GRID.level_shapes(batch.targets.canvas)]
    levels = zip(*(torch.split(v, sizes, dim=1) for v in (ours, theirs, batch.targets.valid)), strict=True)
    values = [number(pearson_loss(*level)) for level in levels]
    assert number(run(PKD(make_pair()), ours, theirs, batch)["loss"]) == pytest.approx(10 * sum(values[:4]), rel=1e-5)
    every = run(PKD(make_pair(), levels=5), ours, theirs, batch)["loss"]
    assert number(every) == pytest.approx(10 * sum(values), rel=1e-5)


@pytest.mark.parametrize("cells", [0, 1, 3])
def test_constant_channels_and_few_cells_have_finite_gradients(cells: int) -> None:
    student = torch.ones(1, 4, 2, requires_grad=True)
    valid = torch.arange(4)[None] < cells
    loss = pearson_loss(student, torch.ones(1, 4, 2), valid)
    loss.backward()
    assert number(loss) == 0
    assert torch.isfinite(grad(student)).all()


def test_two_stage_detectors_have_a_weight_of_their_own() -> None:
    assert resolve_options("pkd", PKD, "faster_rcnn", {})["weight"] == 6
    assert resolve_options("pkd", PKD, "retinanet", {})["weight"] == 10
    assert run(PKD(make_pair(), weight=0.0), maps(1), maps(1), make_batch([TWO])) == {}


@pytest.mark.parametrize("levels", [0, 6])
def test_a_level_count_that_cannot_be_is_refused(levels: int) -> None:
    with pytest.raises(OptionError, match=r"pkd\.levels = \d: must be 1 to 5"):
        PKD(make_pair(), levels=levels)
