"""Student-t against printed tables and a case worked by hand."""

from __future__ import annotations

import math

import pytest

from kdcli.report.stats import difference, summarize, t_cdf, t_quantile


@pytest.mark.parametrize(
    ("freedom", "expected"),  # printed tables of t(0.975)
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_t_quantiles_of_printed_tables(freedom: int, expected: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("freedom", [0.7, 1.0, 2.5, 7.3, 60.0])
def test_cdf_is_the_integral_of_the_density(freedom: float) -> None:
    steps, t = 20_000, 2.2
    front = math.gamma((freedom + 1) / 2) / (math.gamma(freedom / 2) * math.sqrt(math.pi * freedom))
    width = t / steps
    middles = ((i + 0.5) * width for i in range(steps))
    area = math.fsum(front * (1 + x * x / freedom) ** (-(freedom + 1) / 2) * width for x in middles)
    assert t_cdf(t, freedom) == pytest.approx(0.5 + area, abs=1e-8)
    assert t_quantile(t_cdf(t, freedom), freedom) == pytest.approx(t, abs=1e-9)


def test_summary_by_hand() -> None:
    # 42.0, 43.0, 44.5: mean 43.1667, squared deviations 1.3611 + 0.0278 + 1.7778 = 3.1667, std sqrt(1.5833) = 1.2583,
    # half-width 4.3027 * 1.2583 / sqrt(3) = 3.1258
    summary = summarize([42.0, 43.0, 44.5])
    assert summary.mean == pytest.approx(43.1667, abs=1e-4)
    assert summary.std == pytest.approx(1.2583, abs=1e-4)
    assert summary.ci95 == pytest.approx(3.1258, abs=1e-3)
    single = summarize([42.0])
    assert (single.mean, single.std, single.ci95, single.n) == (42.0, None, None, 1)


def test_pairing_removes_what_seeds_share() -> None:
    baseline = {0: 40.0, 1: 44.0, 2: 48.0}
    # differences 2.0, 2.2, 1.8: mean 2, std 0.2, half-width 4.3027 * 0.2 / sqrt(3) = 0.4968
    paired = difference({0: 42.0, 1: 46.2, 2: 49.8, 9: 90.0}, baseline)
    assert paired.mean == pytest.approx(2.0)
    assert (paired.how, paired.n) == ("paired, 3 seeds", 3)
    assert paired.ci95 == pytest.approx(0.4968, abs=1e-3)


def test_welch_without_common_seeds() -> None:
    # variances 1 and 4, n 3 and 2: spread 1/3 + 4/2 = 2.3333, freedom 2.3333^2 / ((1/3)^2/2 + 2^2/1) = 1.3425
    welch = difference({0: 41.0, 1: 42.0, 2: 43.0}, {7: 40.0 - 2**0.5, 8: 40.0 + 2**0.5})
    assert welch.mean == pytest.approx(2.0)
    assert welch.how == "Welch, 3 and 2 seeds"
    assert welch.ci95 == pytest.approx(t_quantile(0.975, 1.34247) * 2.33333**0.5, rel=1e-4)


def test_one_seed_gives_no_interval() -> None:
    assert difference({0: 42.0}, {0: 40.0, 1: 50.0}).mean == 2.0  # the common seed alone
    assert difference({0: 42.0}, {0: 40.0, 1: 50.0}).ci95 is None
    assert difference({3: 42.0}, {0: 40.0, 1: 50.0}).mean == -3.0
    assert difference({3: 42.0}, {0: 40.0, 1: 50.0}).how == "unpaired, 1 and 2 seeds"


def test_equal_values_have_an_interval_of_zero() -> None:
    same = difference({0: 42.0, 1: 42.0}, {5: 40.0, 6: 40.0})
    assert (same.mean, same.ci95) == (2.0, 0.0)
