"""What people read in a terminal: rich tables, on stderr so that stdout stays for ``--json``.

Colours follow rich's rules (``NO_COLOR``, terminals only). Names from files are shown as plain text, never as markup.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdcli.report.compare import Comparison, Group
from kdcli.report.text import MARK, duration, millions, number, plain, signed, size, spelled, with_interval
from kdcli.shown import one_line

if TYPE_CHECKING:
    from kdcli.engine.evaluation.coco_metrics import Metrics

_WIDE = (
    132  # columns that the whole comparison table needs; narrower terminals get quality and cost one below the other
)
Column = tuple[str, Callable[[Group], str]]

_QUALITY: tuple[Column, ...] = (
    ("seeds", lambda g: str(len(g.seeds))),
    ("AP", lambda g: with_interval(g.ap.mean, g.ap.ci95)),
    ("std", lambda g: number(g.ap.std)),
    ("to baseline", lambda g: with_interval(g.diff.mean, g.diff.ci95, plus=True) if g.diff else "-"),
    ("AP50", lambda g: number(g.ap50)),
    ("AP75", lambda g: number(g.ap75)),
    ("best", lambda g: number(g.best_ap)),
)
_COST: tuple[Column, ...] = (
    ("parameters", lambda g: millions(g.parameters)),
    ("time", lambda g: duration(g.wall_s)),
    ("an epoch", lambda g: duration(g.seconds_per_epoch)),
    ("memory", lambda g: size(g.peak_memory_bytes)),
    ("store", lambda g: size(g.store_bytes)),
)


def human_console() -> Console:
    """A console on stderr. Without a terminal it is wide enough for every table unless COLUMNS says otherwise."""
    console = Console(stderr=True, highlight=False, soft_wrap=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDE + 28
    return console


def say(console: Console, *lines: str) -> None:
    """Print lines, each as ``one_line`` shows it; in a pipe it stays one line, for grep, whatever COLUMNS says."""
    for line in lines:
        console.print(Text(one_line(line)), soft_wrap=not console.is_terminal)


def show_comparison(console: Console, comparison: Comparison) -> None:
    """Print the comparison: the table, what differs in the settings, unfinished runs and notes."""
    if console.width >= _WIDE:
        console.print(table_of_comparison(comparison))
    else:
        console.print(table_of_comparison(comparison, columns=_QUALITY))
        console.print(table_of_comparison(comparison, columns=_COST, title="Cost"))
    console.print(Text("± is the 95 % interval over seeds (Student t), paired by seed where seeds match", style="dim"))
    if comparison.settings_diff.keys() - {"command", "method"}:
        console.print(table_of_settings(comparison))
        for footnote in comparison.footnotes:
            console.print(Text(one_line(footnote), style="yellow"))
    for run in comparison.unfinished:
        console.print(Text(one_line(f"left out: {plain(run.path)}: {run.problem}"), style="yellow"))
    for note in comparison.notes:
        console.print(Text(one_line(f"note: {note}"), style="dim"))


def table_of_comparison(
    comparison: Comparison, *, columns: Sequence[Column] = (*_QUALITY, *_COST), title: str = "Comparison"
) -> Table:
    """Teachers, the baseline, then the other groups; AP is of the last epoch, ``±`` the 95 % interval over seeds."""
    table = _table(title, "run", [header for header, _ in columns])
    baseline = next((group.ap.mean for group in comparison.groups if group.role == "baseline"), None)
    for teacher in comparison.teachers:
        gap = signed(None if baseline is None else teacher.ap - baseline)
        own = {"AP": number(teacher.ap), "to baseline": gap, "parameters": millions(teacher.parameters)}
        name = Text("teacher" if teacher.name == "teacher" else f"teacher {plain(teacher.name)}", style="italic")
        table.add_row(name, *(Text(own.get(header, "-")) for header, _ in columns))
    for group in comparison.students:
        name = Text(plain(group.name), style="bold" if group.role == "baseline" else "")
        for approximation in group.approximations:
            name.append(f"\n{MARK} {one_line(approximation)}", style="yellow")
        table.add_row(name, *(Text(value(group)) for _, value in columns))
    return table


def table_of_settings(comparison: Comparison) -> Table:
    """The settings that differ between groups: each value with the groups that have it, the most common value first."""
    table = _table("Settings that differ", "setting", [])
    table.add_column("value", overflow="fold")
    table.add_column("groups", overflow="fold")
    labels = {group.name: group.label for group in comparison.groups}
    for key, by_group in comparison.settings_diff.items():
        if key in ("command", "method"):  # the names of the groups say it
            continue
        users: dict[str, list[str]] = {}
        for name, value in by_group.items():
            users.setdefault(spelled(value), []).append(plain(labels[name]))
        for i, (value, names) in enumerate(sorted(users.items(), key=lambda item: -len(item[1]))):
            others = i == 0 and len(names) > 1
            table.add_row(
                Text(plain(key) if i == 0 else ""), Text(value), Text("others" if others else ", ".join(names))
            )
    return table


def table_of_metrics(metrics: Metrics, *, more: Mapping[str, str] | None = None, title: str = "COCO box AP") -> Table:
    """The metrics of one evaluation, ``more`` rows of spelled values (images/s, parameters), then each class."""
    rows = (("AP", metrics.ap), ("AP50", metrics.ap50), ("AP75", metrics.ap75), ("AP_S", metrics.ap_s))
    table = _table(title, "", ["value"])
    for name, value in (*rows, ("AP_M", metrics.ap_m), ("AP_L", metrics.ap_l), ("AR", metrics.ar)):
        table.add_row(Text(name, style="bold"), number(value))
    for name, text in (more or {}).items():
        table.add_row(Text(plain(name)), Text(plain(text)))
    table.add_section()
    for name, value in metrics.per_class.items():
        table.add_row(Text(plain(name)), number(value))
    return table


def _table(title: str, first: str, others: Sequence[str]) -> Table:
    table = Table(
        title=Text(plain(title)), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False
    )
    table.add_column(Text(first), overflow="fold", min_width=12)
    for header in others:
        table.add_column(Text(plain(header)), justify="right", overflow="fold")
    return table
