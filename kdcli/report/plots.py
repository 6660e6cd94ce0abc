"""PNG plots: AP with intervals, learning curves, and the loss terms of one run (matplotlib, without a display)."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdcli.files import atomic_write_bytes
from kdcli.report.colours import chart_colour
from kdcli.report.compare import Comparison, Group
from kdcli.report.fonts import dejavu, family_of, writable
from kdcli.report.runs import Run, mean_curve
from kdcli.report.text import MARK, plain, signed, with_interval
from kdcli.shown import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = ("-", "--", "-.", ":")  # a second mark beside the colour, and a new one when the six colours start over
_DPI = 150


def write_plots(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``ap.png`` and ``learning_curves.png`` into ``folder`` (made if needed); returns the paths written.

    A plot without data (no finished run, no epoch with an AP) is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if comparison.students:
        plot_ap(comparison, folder / "ap.png")
        written.append(folder / "ap.png")
    if any(mean_curve(group.runs) for group in comparison.students):
        plot_learning_curves(comparison, folder / "learning_curves.png")
        written.append(folder / "learning_curves.png")
    return written


def plot_ap(comparison: Comparison, path: Path) -> None:
    """Bars of AP from zero, with 95 % intervals and the teacher as a line; beside them differences to the baseline."""
    from matplotlib.figure import Figure

    groups = comparison.students
    compared = any(group.diff is not None for group in groups)
    figure = Figure(figsize=(10 if compared else 6.5, 1.4 + 0.45 * len(groups)), layout="constrained")
    bars = figure.add_subplot(1, 2 if compared else 1, 1)
    rows = range(len(groups))
    means = [group.ap.mean for group in groups]
    errors = [math.nan if group.ap.ci95 is None else group.ap.ci95 for group in groups]
    bars.barh(rows, means, color=[chart_colour(i) for i in rows], height=0.6)
    bars.errorbar(means, rows, xerr=errors, fmt="none", ecolor="black", capsize=3)
    highest = _highest(comparison)
    for row, group in zip(rows, groups, strict=True):
        bars.text(1.04 * highest, row, with_interval(group.ap.mean, group.ap.ci95), va="center", fontsize=8)
    for teacher in comparison.teachers:
        bars.axvline(teacher.ap, color="#555555", linestyle="--", linewidth=1)
        bars.annotate(
            f"teacher {teacher.ap:.1f}",
            (teacher.ap, 1),
            (0, 3),
            fontsize=8,
            ha="center",
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
        )
    bars.set_yticks(rows, [_label(group) for group in groups], fontsize=8)
    bars.set_xlim(0, 1.3 * highest)
    bars.set_xlabel("AP, last epoch; whisker: 95 % interval over seeds", fontsize=8)
    _as_rows(bars, len(groups))
    if compared:
        _plot_differences(figure.add_subplot(1, 2, 2), groups)
    _add_footnotes(figure, comparison.footnotes)
    _save(figure, path)


def plot_learning_curves(comparison: Comparison, path: Path) -> None:
    """AP per epoch: the mean over seeds, and a band from the lowest to the highest seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for i, group in enumerate(comparison.students):
        curve = mean_curve(group.runs)
        if not curve:
            continue
        epochs, means, lows, highs = (list(column) for column in zip(*curve, strict=True))
        colour, dash = chart_colour(i), _DASHES[(i // 6 + i) % len(_DASHES)]
        axes.plot(epochs, means, color=colour, linestyle=dash, label=_label(group), marker="o", markersize=3)
        if len(group.runs) > 1:
            axes.fill_between(epochs, lows, highs, color=colour, alpha=0.18, linewidth=0)
    for teacher in comparison.teachers:
        axes.axhline(teacher.ap, color="#555555", linestyle="--", linewidth=1, label=f"teacher {teacher.ap:.1f}")
    _finish(axes, "AP (mean of the seeds; band: lowest to highest)")
    _add_footnotes(figure, comparison.footnotes)
    _save(figure, path)


def plot_run(run: Run, path: Path) -> None:
    """AP, every loss term, and the terms' shares of the gradient, epoch by epoch; panels without data are left out.

    Loss terms are drawn on a logarithmic axis when all are positive, since they differ by orders of magnitude.
    """
    from matplotlib.figure import Figure

    shares = sorted({c for row in run.history for c in row if c.startswith("grad_share_")})
    wanted = (("AP", ["AP", "AP50", "AP75"]), ("loss terms", run.loss_columns()), ("share of the gradient", shares))
    panels = [(title, [c for c in columns if run.curve(c)]) for title, columns in wanted]
    panels = [(title, columns) for title, columns in panels if columns]
    figure = Figure(figsize=(8, 0.6 + 2.6 * max(1, len(panels))), layout="constrained")
    last = max((row["epoch"] for row in run.history), default=1)
    for i, (title, columns) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, i + 1)
        for k, column in enumerate(columns):
            epochs, values = zip(*run.curve(column), strict=True)
            name = _text(column.removeprefix("grad_share_"))
            axes.plot(epochs, values, color=chart_colour(k), linestyle=_DASHES[k // 6 % 4], label=name, marker=".")
        if title == "loss terms" and all(value > 0 for c in columns for _, value in run.curve(c)):
            axes.set_yscale("log")
        axes.set_xlim(0.5, last + 0.5)
        _finish(axes, title)
    _add_footnotes(figure, [f"{MARK} {approximation}" for approximation in run.approximations])
    _save(figure, path)


def _plot_differences(axes: Axes, groups: Sequence[Group]) -> None:
    """Differences to the baseline, enlarged: bars from zero hide what a point of AP is. Same rows as the bars."""
    for row, group in enumerate(groups):
        if group.diff is None:
            continue
        error = math.nan if group.diff.ci95 is None else group.diff.ci95
        axes.errorbar(group.diff.mean, row, xerr=[error], fmt="o", color=chart_colour(row), capsize=3)
        axes.annotate(
            signed(group.diff.mean), (group.diff.mean, row), (0, 6), textcoords="offset points", ha="center", fontsize=8
        )
    axes.axvline(0, color="black", linewidth=1)
    axes.margins(x=0.15)
    axes.set_yticks([])
    axes.set_xlabel("AP minus baseline; whisker: 95 % interval", fontsize=8)
    _as_rows(axes, len(groups))


def _as_rows(axes: Axes, count: int) -> None:
    axes.set_ylim(count - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _finish(axes: Axes, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.set_ylabel(title, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _highest(comparison: Comparison) -> float:
    """The largest AP that is drawn, at least 1 so that an axis exists."""
    tops = [group.ap.mean + (group.ap.ci95 or 0) for group in comparison.students]
    return max(1.0, *tops, *(teacher.ap for teacher in comparison.teachers))


def _label(group: Group) -> str:
    seeds = len(group.seeds)
    return _text(f"{group.label}, {seeds} seed{'s' if seeds > 1 else ''}")


def _text(name: str) -> str:
    """A name as matplotlib draws it literally: dollars start no formula, a leading underscore does not hide it."""
    shown = writable(plain(name))[0].replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _add_footnotes(figure: Figure, footnotes: Sequence[str]) -> None:
    """What the marks stand for, below the panels; the figure grows by the lines, so that the panels keep their size."""
    width = int(14 * figure.get_figwidth())  # characters of 8 points that surely fit
    lines = [_text(line) for footnote in footnotes for line in textwrap.wrap(one_line(footnote), width)]
    if lines:
        figure.set_figheight(figure.get_figheight() + 0.1 + 0.16 * len(lines))
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", multialignment="left", fontsize=8)


def _choose_fonts(figure: Figure) -> None:
    """Give every text that DejaVu cannot write the font that can; where none can, ``_text`` has written it otherwise."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        _, font = writable(text.get_text())
        if font not in (None, dejavu()):
            text.set_fontfamily(["DejaVu Sans", family_of(font)])


def _save(figure: Figure, path: Path) -> None:
    """Write the PNG, all or nothing. Raises NoSpaceError when the disk is full."""
    _choose_fonts(figure)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=_DPI)
    atomic_write_bytes(path, data.getvalue())
