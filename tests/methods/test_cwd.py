"""CWD against a loop over images and channels."""

from __future__ import annotations

import math

import pytest
import torch

from kdcli.methods.cwd import CWD, channel_divergence
from tests.support.feature_case import GRID, TWO, check_common, make_batch, make_pair, maps, number, run


def test_cwd_does_what_every_method_must() -> None:
    check_common(CWD)


def by_hand(student: list[float], teacher: list[float], temperature: float) -> float:
    """tau^2 KL of one channel of one image."""
    p = [math.exp(t / temperature) for t in teacher]
    q = [math.exp(s / temperature) for s in student]
    p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_level_is_the_mean_over_channels_of_the_divergence_over_valid_cells(temperature: float) -> None:
    student, teacher = maps(2, 3, 1)[:, :6].double(), maps(2, 3, 2)[:, :6].double()
    valid = torch.tensor([[True] * 6, [True, True, False, True, False, False]])
    found = channel_divergence(student, teacher, valid, temperature)
    for i in range(2):
        rows = valid[i].nonzero()[:, 0]
        channels = [by_hand(student[i, rows, c].tolist(), teacher[i, rows, c].tolist(), temperature) for c in range(3)]
        assert number(found[i]) == pytest.approx(sum(channels) / 3, rel=1e-12)


def test_cwd_sums_levels_and_averages_images() -> None:
    batch = make_batch([TWO, TWO])
    ours, theirs = maps(2, seed=1), maps(2, seed=2)
    start, total = 0, 0.0
    for size in [h * w for h, w in GRID.level_shapes(batch.targets.canvas)]:
        part = slice(start, start + size)
        total += number(channel_divergence(ours[:, part], theirs[:, part], batch.targets.valid[:, part], 1.0).mean())
        start += size
    assert number(run(CWD(make_pair()), ours, theirs, batch)["loss"]) == pytest.approx(10 * total, rel=1e-5)


def test_equal_maps_have_no_loss_and_a_shift_of_a_channel_costs_nothing() -> None:
    batch, ours = make_batch([TWO]), maps(1)
    method = CWD(make_pair())
    assert number(run(method, ours, ours.detach() + torch.arange(8.0), batch)["loss"]) == pytest.approx(0, abs=1e-5)
    assert run(CWD(make_pair(), weight=0.0), ours, ours, batch) == {}


def test_an_image_without_valid_cells_is_0_with_a_finite_gradient() -> None:
    student = maps(1, 3, 1)[:, :4].detach().requires_grad_()
    loss = channel_divergence(student, maps(1, 3, 2)[:, :4], torch.zeros(1, 4, dtype=torch.bool), 1.0).sum()
    loss.backward()
    assert number(loss) == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_the_adapter_is_one_convolution_without_bias() -> None:
    (weight,) = CWD(make_pair(6, 10)).parameters()
    assert weight.shape == (10, 6)
    assert list(CWD(make_pair()).parameters()) == []
