"""Mean, standard deviation and Student-t intervals of a handful of seeds, without scipy.

The t distribution comes from the regularised incomplete beta function (continued fraction, Numerical Recipes 6.4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Mean of ``n`` values; ``std`` (n - 1 in the denominator) and ``ci95`` are None when n < 2.

    ``ci95`` is the half-width of the two-sided 95 % interval: mean - ci95 .. mean + ci95.
    """

    mean: float
    std: float | None
    ci95: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean difference to the baseline and the half-width of its 95 % interval (None when it cannot be known).

    ``how`` says what it rests on, e.g. ``paired, 3 seeds``.
    """

    mean: float
    ci95: float | None
    n: int
    how: str


def summarize(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and 95 % interval of at least one value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Summary(mean, None, None, n)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Summary(mean, std, t_quantile(0.975, n - 1) * std / math.sqrt(n), n)


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Difference of two groups of values by seed.

    Two or more seeds in common: paired, over these seeds alone. Otherwise Welch's interval when both sides have two
    values; otherwise the plain difference (of the one common seed if there is one), without an interval.
    """
    common = sorted(values.keys() & baseline.keys())
    if len(common) >= 2:
        paired = summarize([values[seed] - baseline[seed] for seed in common])
        return Difference(paired.mean, paired.ci95, paired.n, f"paired, {paired.n} seeds")
    a, b = summarize(list(values.values())), summarize(list(baseline.values()))
    if a.std is not None and b.std is not None:
        va, vb = a.std**2 / a.n, b.std**2 / b.n
        spread = va + vb
        freedom = spread**2 / (va**2 / (a.n - 1) + vb**2 / (b.n - 1)) if spread else float(a.n + b.n - 2)
        ci95 = t_quantile(0.975, freedom) * math.sqrt(spread)
        return Difference(a.mean - b.mean, ci95, min(a.n, b.n), f"Welch, {a.n} and {b.n} seeds")
    if common:
        return Difference(values[common[0]] - baseline[common[0]], None, 1, "paired, 1 seed")
    return Difference(a.mean - b.mean, None, min(a.n, b.n), f"unpaired, {a.n} and {b.n} seeds")


def t_quantile(probability: float, freedom: float) -> float:
    """The value below which Student's t with ``freedom`` degrees (any real > 0) falls with ``probability`` > 0.5."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(80):  # 80 halvings reach the last bit of a double
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def t_cdf(t: float, freedom: float) -> float:
    """Cumulative distribution of Student's t for t >= 0."""
    return 1 - 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised I_x(a, b)."""
    if x in (0.0, 1.0):
        return x
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )  # x^a (1-x)^b / B(a, b)
    if x < (a + 1) / (a + b + 2):  # where the fraction converges fast
        return front * _beta_fraction(a, b, x) / a
    return 1 - front * _beta_fraction(b, a, 1 - x) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Continued fraction of the incomplete beta function by the modified Lentz method."""
    tiny = 1e-300
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 + term * d
            c = 1 + term / c
            d = 1 / (d if abs(d) > tiny else tiny)
            c = c if abs(c) > tiny else tiny
            value *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return value
