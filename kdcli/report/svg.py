"""The charts of the HTML report as inline SVG: text in the page's own colour, nothing to load, every name escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from kdcli.report.colours import chart_colour
from kdcli.report.compare import Comparison, Group
from kdcli.report.runs import mean_curve
from kdcli.report.text import plain, signed, with_interval

_DASHES = ("", "7 3", "2 3", "9 3 2 3")  # a second mark beside the colour
_WIDTH = 760
_NAME = 230  # pixels of the column of names
_ROW = 30


def ap_bars(comparison: Comparison) -> str:
    """Bars of AP from zero with 95 % intervals; each teacher is a dashed line."""
    groups = comparison.students
    tops = [g.ap.mean + (g.ap.ci95 or 0) for g in groups] + [teacher.ap for teacher in comparison.teachers]
    ticks = nice_ticks(0, max([1.0, *tops]))
    left, right = _NAME, _WIDTH - 110
    x = _scale(0, max(ticks[-1], *tops), left, right)
    bottom = 24 + _ROW * len(groups)
    parts = [_vertical_axis(x, ticks, 24, bottom, "AP, last epoch")]
    for i, group in enumerate(groups):
        middle = 24 + _ROW * i + _ROW / 2
        parts.append(_row_name(group, middle))
        width = x(max(group.ap.mean, 0)) - left
        parts.append(
            f'<rect x="{left}" y="{middle - 9:.1f}" width="{width:.1f}" height="18" fill="{chart_colour(i)}"/>'
        )
        parts.append(_whisker(x, group.ap.mean, group.ap.ci95, middle))
        label = escape(with_interval(group.ap.mean, group.ap.ci95))
        parts.append(f'<text x="{right + 8}" y="{middle + 4:.1f}">{label}</text>')
    for teacher in comparison.teachers:
        at = x(teacher.ap)
        parts.append(f'<line class="teacher" x1="{at:.1f}" x2="{at:.1f}" y1="20" y2="{bottom}"/>')
        parts.append(f'<text class="small" x="{at:.1f}" y="14" text-anchor="middle">teacher {teacher.ap:.1f}</text>')
    return _svg(bottom + 42, "AP of each group with 95 % intervals", parts)


def difference_dots(comparison: Comparison) -> str:
    """Differences to the baseline with 95 % intervals on their own scale; empty without a baseline."""
    groups = [(i, group, group.diff) for i, group in enumerate(comparison.students) if group.diff is not None]
    if not groups:
        return ""
    lows = [d.mean - (d.ci95 or 0) for _, _, d in groups]
    highs = [d.mean + (d.ci95 or 0) for _, _, d in groups]
    ticks = nice_ticks(min(0.0, *lows), max(0.0, *highs))
    x = _scale(min(ticks[0], *lows), max(ticks[-1], *highs), _NAME, _WIDTH - 110)
    bottom = 10 + _ROW * len(groups)
    parts = [_vertical_axis(x, ticks, 10, bottom, "AP minus baseline")]
    parts.append(f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="10" y2="{bottom}"/>')
    for row, (i, group, diff) in enumerate(groups):
        middle = 10 + _ROW * row + _ROW / 2
        parts.append(_row_name(group, middle))
        parts.append(_whisker(x, diff.mean, diff.ci95, middle))
        parts.append(f'<circle cx="{x(diff.mean):.1f}" cy="{middle:.1f}" r="6" fill="{chart_colour(i)}"/>')
        label = escape(with_interval(diff.mean, diff.ci95, plus=True))
        parts.append(f'<text x="{_WIDTH - 102}" y="{middle + 4:.1f}">{label}</text>')
    return _svg(bottom + 42, "Difference of AP to the baseline with 95 % intervals", parts)


def learning_curves(comparison: Comparison) -> str:
    """AP per epoch: mean over seeds, band from the lowest to the highest; empty when no epoch has an AP."""
    curves = [(i, group, mean_curve(group.runs)) for i, group in enumerate(comparison.students)]
    curves = [(i, group, curve) for i, group, curve in curves if curve]
    if not curves:
        return ""
    tops = [high for _, _, curve in curves for *_, high in curve] + [teacher.ap for teacher in comparison.teachers]
    epochs = [epoch for _, _, curve in curves for epoch, *_ in curve]
    yticks = nice_ticks(0, max([1.0, *tops]))
    xticks = [
        tick
        for tick in nice_ticks(min(epochs), max(epochs))
        if tick == round(tick) and min(epochs) <= tick <= max(epochs)
    ]
    x = _scale(min(epochs), max(max(epochs), min(epochs) + 1), 50, _WIDTH - 20)
    y = _scale(0, max(yticks[-1], *tops), 320, 20)
    parts = []
    for tick in yticks:
        parts.append(f'<line class="grid" x1="50" x2="{_WIDTH - 20}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="small" x="44" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in xticks:
        parts.append(f'<text class="small" x="{x(tick):.1f}" y="338" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text class="small" x="{_WIDTH / 2}" y="358" text-anchor="middle">epoch</text>')
    for i, group, curve in curves:
        if len(group.runs) > 1:
            edge = [(e, high) for e, _, _, high in curve] + [(e, low) for e, _, low, _ in reversed(curve)]
            points = " ".join(f"{x(e):.1f},{y(v):.1f}" for e, v in edge)
            parts.append(f'<polygon points="{points}" fill="{chart_colour(i)}" fill-opacity="0.2"/>')
        points = " ".join(f"{x(e):.1f},{y(mean):.1f}" for e, mean, _, _ in curve)
        parts.append(f'<polyline points="{points}" fill="none" {_stroke(i)}><title>{_name(group)}</title></polyline>')
        e, mean, *_ = curve[-1]
        parts.append(f'<circle cx="{x(e):.1f}" cy="{y(mean):.1f}" r="3.5" fill="{chart_colour(i)}"/>')
    for teacher in comparison.teachers:
        at = y(teacher.ap)
        parts.append(f'<line class="teacher" x1="50" x2="{_WIDTH - 20}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="small" x="54" y="{at - 5:.1f}">teacher {teacher.ap:.1f}</text>')
    return _svg(366, "AP of each group per epoch", parts)


def legend(comparison: Comparison) -> str:
    """The colour and dash of each group, for the learning curves."""
    items = []
    for i, group in enumerate(comparison.students):
        line = f'<svg width="34" height="10" aria-hidden="true"><line x1="1" x2="33" y1="5" y2="5" {_stroke(i)}/></svg>'
        items.append(f"<span>{line} {_name(group)}</span>")
    return f'<p class="legend">{" ".join(items)}</p>'


def nice_ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers from at or below ``low`` to at or above ``high``."""
    if high <= low:
        high = low + 1.0  # every difference is 0: any span will do
    span = high - low
    power = 10.0 ** math.floor(math.log10(span))
    step = next(s for s in (0.2 * power, 0.5 * power, power, 2 * power) if span / s <= 7)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Linear map of low..high to pixels start..end."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _stroke(index: int) -> str:
    dash = _DASHES[(index + index // 6) % len(_DASHES)]
    return f'stroke="{chart_colour(index)}" stroke-width="2.5"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _vertical_axis(x: Callable[[float], float], ticks: Sequence[float], top: float, bottom: float, title: str) -> str:
    parts = []
    for tick in ticks:
        at = f"{x(tick):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="small" x="{at}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    middle = (x(ticks[0]) + x(ticks[-1])) / 2
    parts.append(f'<text class="small" x="{middle:.1f}" y="{bottom + 34}" text-anchor="middle">{escape(title)}</text>')
    return "".join(parts)


def _whisker(x: Callable[[float], float], mean: float, ci95: float | None, middle: float) -> str:
    if ci95 is None:
        return ""
    low, high = max(x(mean - ci95), _NAME), x(mean + ci95)  # an interval below zero AP ends at the axis
    cap = "".join(f"M{at:.1f} {middle - 5:.1f}V{middle + 5:.1f}" for at in (low, high))
    return f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}{cap}"/>'


def _row_name(group: Group, middle: float) -> str:
    full = plain(group.label)
    short = full if len(full) <= 32 else full[:31] + "…"
    text = f"{escape(short)}<title>{_name(group)}</title>"
    return f'<text x="{_NAME - 8}" y="{middle + 4:.1f}" text-anchor="end">{text}</text>'


def _name(group: Group) -> str:
    seeds = len(group.seeds)
    gain = f", {signed(group.diff.mean)} AP" if group.diff is not None else ""
    return escape(f"{plain(group.label)} ({seeds} seed{'s' if seeds > 1 else ''}{gain})")


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    head = f'<svg class="chart" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return head + "\n".join(parts) + "</svg>"
