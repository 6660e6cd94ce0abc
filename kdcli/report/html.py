"""The comparison as one self-contained HTML file: no script, nothing to load, every name escaped, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from kdcli import __version__
from kdcli.files import atomic_write_text
from kdcli.report import svg
from kdcli.report.compare import Comparison, Group
from kdcli.report.runs import flatten
from kdcli.report.text import MARK, duration, millions, number, plain, signed, size, spelled, with_interval
from kdcli.shown import one_line

# What env.json says about one run, not about where the runs were made.
_ONE_RUN_ONLY = frozenset({"argv", "seed", "started", "finished", "teacher", "store"})
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1a1a1a; --soft: #5c5c5c; --rule: #d9d9d9; --band: #f5f5f5; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181c; --text: #e8e8e8; --soft: #a6a6a6; --rule: #3a3d42; --band: #1f2227; } }
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child, .left td { text-align: left; } .left td { white-space: normal; word-break: break-word; }
thead th { border-bottom: 2px solid var(--rule); } tr.baseline { background: var(--band); font-weight: 600; }
tr.teacher { font-style: italic; } small, .soft { color: var(--soft); } .chart { width: 100%; max-width: 860px; }
.chart text { fill: var(--text); font-size: 13px; } .chart text.small { fill: var(--soft); font-size: 12px; }
.chart .grid { stroke: var(--rule); }
.chart .zero, .chart .whisker { stroke: var(--text); stroke-width: 1.5; fill: none; }
.chart .teacher { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 6 4; }
.legend span { display: inline-block; margin-right: 1.2rem; } .gist { font-size: 1.05rem; }
"""


def write_html(comparison: Comparison, path: Path) -> None:
    """Write ``render_html`` to ``path``, all or nothing. Raises NoSpaceError when the disk is full."""
    atomic_write_text(path, render_html(comparison))


def render_html(comparison: Comparison) -> str:
    """The whole page. It depends on the comparison alone, so the same runs give the same file."""
    sections = [
        _section("Results", _results(comparison) + _remarks(comparison)),
        _section("AP", svg.ap_bars(comparison) if comparison.students else ""),
        _section("Difference to the baseline", svg.difference_dots(comparison)),
        _section("Learning curves", _curves(comparison)),
        _section("Settings that differ", _settings(comparison)),
        _section("AP of each class", _classes(comparison)),
        _section("Runs", _runs(comparison)),
        _section("Environment", _environment(comparison)),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<title>kdcli comparison</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>kdcli comparison</h1>
<p class="gist">{escape(gist(comparison))}</p>
{"".join(sections)}{_soft(comparison.footnotes)}
<p class="soft">Written by kdcli {escape(__version__)}.</p>
</body>
</html>
"""


def gist(comparison: Comparison) -> str:
    """The result in one sentence: the best distilled group against the baseline, and whether it may be chance."""
    distilled = [group for group in comparison.groups if group.role == "distill"]
    compared = [(group.diff.mean, group, group.diff) for group in distilled if group.diff is not None]
    base = next((group for group in comparison.groups if group.role == "baseline"), None)
    if not compared or base is None:
        return "There is no baseline to compare with." if comparison.groups else "There is no finished run."
    _, best, diff = max(compared, key=lambda item: item[0])
    start = f"{plain(best.label)} reaches {number(best.ap.mean)} AP, the baseline {number(base.ap.mean)}: "
    start += f"a difference of {with_interval(diff.mean, diff.ci95, plus=True)} ({diff.how})."
    if diff.ci95 is None:
        return f"{start} One seed cannot say how much of it is chance."
    if abs(diff.mean) <= diff.ci95:
        return f"{start} The interval includes zero, so it may be chance."
    return start


def _section(title: str, body: str) -> str:
    """A heading and its content; nothing at all without content."""
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>\n" if body else ""


def _table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], style: str = "") -> str:
    """``header`` is text, ``rows`` are a CSS class and cells that are HTML already."""
    head = "".join(f"<th>{escape(plain(name))}</th>" for name in header)
    body = "\n".join(f'<tr class="{css}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>' for css, cells in rows)
    table = f'<table class="{style}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _results(comparison: Comparison) -> str:
    header = (
        "run,seeds,AP,std,to baseline,AP50,AP75,AP_S,AP_M,AP_L,AR,best,parameters,time,an epoch,images/s,memory,store"
    )
    columns = header.split(",")
    rows: list[tuple[str, Sequence[str]]] = []
    base = next((group.ap.mean for group in comparison.groups if group.role == "baseline"), None)
    for teacher in comparison.teachers:
        own = {
            "run": escape(f"teacher {plain(teacher.name)}" if teacher.name != "teacher" else "teacher"),
            "AP": number(teacher.ap),
            "to baseline": signed(None if base is None else teacher.ap - base),
            "parameters": millions(teacher.parameters),
        }
        rows.append(("teacher", [own.get(column, "-") for column in columns]))
    rows += [(group.role, _result_cells(group)) for group in comparison.students]
    return _table(columns, rows) if rows else ""


def _result_cells(group: Group) -> list[str]:
    name = escape(plain(group.name))
    name += "".join(f"<br/><small>{MARK} {escape(one_line(used))}</small>" for used in group.approximations)
    diff = "-"
    if group.diff is not None:
        diff = (
            f"{with_interval(group.diff.mean, group.diff.ci95, plus=True)}<br/><small>{escape(group.diff.how)}</small>"
        )
    shown = [with_interval(group.ap.mean, group.ap.ci95), number(group.ap.std), diff]
    aps = (group.ap50, group.ap75, group.ap_s, group.ap_m, group.ap_l, group.ar, group.best_ap)
    cost = [millions(group.parameters), duration(group.wall_s), duration(group.seconds_per_epoch)]
    cost += [number(group.images_per_s), size(group.peak_memory_bytes), size(group.store_bytes)]
    return [name, str(len(group.seeds)), *shown, *map(number, aps), *cost]


def _remarks(comparison: Comparison) -> str:
    lines = [
        "AP (COCO, 0-100) is that of the last epoch, averaged over seeds; best is that of the best epoch. "
        "± is the 95 % interval (Student t). Memory is the largest peak of the runs.",
        *comparison.notes,
        *(f"{teacher.name}: AP from {teacher.source}" for teacher in comparison.teachers),
        *(f"left out: {run.path}: {run.problem}" for run in comparison.unfinished),
    ]
    return _soft(lines)


def _soft(lines: Sequence[str]) -> str:
    return "".join(f'<p class="soft">{escape(one_line(line))}</p>' for line in lines)


def _curves(comparison: Comparison) -> str:
    chart = svg.learning_curves(comparison)
    remark = '<p class="soft">Line: mean of the seeds. Band: lowest to highest seed.</p>'
    return chart and chart + svg.legend(comparison) + remark


def _settings(comparison: Comparison) -> str:
    groups = [group for group in comparison.groups if group.role != "teacher"]
    rows = [
        ("", [escape(plain(key)), *(escape(spelled(values[group.name])) for group in groups)])
        for key, values in comparison.settings_diff.items()
    ]
    return _table(["setting", *(group.label for group in groups)], rows, "left") if rows else ""


def _classes(comparison: Comparison) -> str:
    groups = comparison.students
    classes = dict.fromkeys(name for group in groups for name in group.per_class)
    rows = [("", [escape(plain(c)), *(number(group.per_class.get(c)) for group in groups)]) for c in classes]
    table = _table(["class", *(group.label for group in groups)], rows) if rows else ""
    return table and f"<details><summary>{len(rows)} classes</summary>{table}</details>"


def _runs(comparison: Comparison) -> str:
    rows = [
        ("", [escape(plain(value)) for value in (group.label, run.seed, number(run.value("ap")), run.path)])
        for group in comparison.groups
        for run in group.runs
    ]
    return _table(["group", "seed", "AP", "folder"], rows, "left") if rows else ""


def _environment(comparison: Comparison) -> str:
    """What the runs were made with; several values where they differ."""
    found: dict[str, dict[str, None]] = {}
    for group in comparison.groups:
        for run in group.runs:
            for key, value in flatten(run.env).items():
                if key.split(".")[0] not in _ONE_RUN_ONLY:
                    found.setdefault(key, {})[spelled(value)] = None
    rows = [("", [escape(plain(key)), escape(" | ".join(values))]) for key, values in sorted(found.items())]
    return _table(["", "value"], rows, "left") if rows else ""
