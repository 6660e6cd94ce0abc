"""What approximates carries its mark in every table, plot and report, and each ends by naming it; nothing else does."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from kdcli.report import plots, svg
from kdcli.report.compare import Comparison, compare, load_runs
from kdcli.report.console import show_comparison
from kdcli.report.html import render_html
from kdcli.report.runs import load_run
from kdcli.report.text import MARK

MakeRun = Callable[..., Path]
_HOW = ["method drkd_lite", "stored as float16" + ", more words than fit on one line of a plot" * 4]
_METHOD = "drkd_lite"


def _comparison(make_run: MakeRun, approximations: list[str]) -> Comparison:
    """A baseline, an exact group of its own settings and another model, and the group that may approximate."""
    base = make_run("base", ap=40.0)
    make_run("ld", ap=41.0, method=["ld"], model="gfl_resnet34", tables={"ld": {"temperature": 5.0}})
    folder = make_run(
        "lite",
        ap=42.0,
        method=[_METHOD],
        model="gfl_resnet34",
        options={"batch": 4},
        metrics={"approximations": approximations, "teacher_ap": 54.0},
    )
    return compare(load_runs([folder.parent]), base)


@pytest.fixture
def marked(make_run: MakeRun) -> Comparison:
    return _comparison(make_run, _HOW)


def _section(page: str, title: str) -> str:
    """The text of one section of the page, cells apart."""
    sections = ET.fromstring(page.replace("<!DOCTYPE html>", "")).iter("section")
    return next("\n".join(s.itertext()) for s in sections if s.findtext("h2") == title)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """File name -> the texts in its figure, filled as plots are saved."""
    texts: dict[str, list[str]] = {}
    save = plots._save

    def spy(figure: Figure, path: Path) -> None:
        save(figure, path)
        texts[path.name] = [found.get_text() for found in figure.findobj(Text) if isinstance(found, Text)]

    monkeypatch.setattr(plots, "_save", spy)
    return texts


def test_only_what_approximates_has_the_mark(marked: Comparison) -> None:
    assert [group.label for group in marked.groups] == ["baseline", "ld", f"{MARK} {_METHOD}"]
    assert marked.footnotes == (f"{MARK} {_METHOD}: {'; '.join(_HOW)}",)
    found = marked.to_json()
    assert [group["name"] for group in found["groups"]] == ["baseline", "ld", _METHOD]  # names stay keys
    assert [group["approximations"] for group in found["groups"]] == [[], [], _HOW]
    assert [note[:11] for note in marked.notes if "differs" in note] == ["ld differs ", f"{MARK} {_METHOD}"]


@pytest.mark.parametrize(
    "section",
    ["AP", "Difference to the baseline", "Learning curves", "Settings that differ", "AP of each class", "Runs"],
)
def test_each_section_of_the_page_has_the_mark(marked: Comparison, section: str) -> None:
    text = _section(render_html(marked), section)
    assert f"{MARK} {_METHOD}" in text
    assert f"{MARK} ld" not in text
    assert f"{MARK} baseline" not in text


def test_the_page_names_what_approximates_in_its_results_and_at_its_end(marked: Comparison) -> None:
    page = render_html(marked)
    assert all(f"{MARK} {how}" in _section(page, "Results") for how in _HOW)
    assert f"{marked.footnotes[0]}</p>\n" in page[page.rindex("</section>") :]
    assert f'<p class="gist">{MARK} {_METHOD} reaches' in page


def test_a_long_name_loses_its_end_not_its_mark(make_run: MakeRun) -> None:
    make_run("base")
    folder = make_run("long", method=["m" * 60], metrics={"approximations": _HOW})
    assert f">{MARK} mmmm" in svg.ap_bars(compare(load_runs([folder.parent])))


@pytest.mark.parametrize("width", [80, 160])
def test_the_console_marks_results_and_settings(marked: Comparison, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    show_comparison(console, marked)
    assert isinstance(console.file, io.StringIO)
    results, settings = re.sub(r"\s+", " ", console.file.getvalue()).split("Settings that differ")
    assert f"{MARK} {_HOW[0]}" in results
    table, _, footnote = settings.partition(f"{MARK} {_METHOD}: ")
    assert f"{MARK} {_METHOD}" in table
    assert f"{MARK} ld" not in table
    assert _HOW[0] in footnote


def test_plots_have_the_mark_and_say_what_it_stands_for(
    marked: Comparison, tmp_path: Path, drawn: dict[str, list[str]]
) -> None:
    """Warnings are errors in these tests, so a font without the glyph fails here."""
    plots.write_plots(marked, tmp_path)
    for name in ("ap.png", "learning_curves.png"):
        assert f"{MARK} {_METHOD}, 1 seed" in drawn[name]
        assert "ld, 1 seed" in drawn[name]
        assert marked.footnotes[0] in [text.replace("\n", " ") for text in drawn[name]]
    plots.plot_run(load_run(tmp_path / "runs" / "lite"), tmp_path / "run.png")
    wanted = " ".join(f"{MARK} {how}" for how in _HOW)
    assert wanted in [text.replace("\n", " ") for text in drawn["run.png"]]


def test_nothing_is_marked_where_nothing_approximates(
    make_run: MakeRun, tmp_path: Path, drawn: dict[str, list[str]]
) -> None:
    exact = _comparison(make_run, [])
    console = Console(file=io.StringIO(), width=160)
    show_comparison(console, exact)
    plots.write_plots(exact, tmp_path)
    plots.plot_run(load_run(tmp_path / "runs" / "lite"), tmp_path / "run.png")
    assert isinstance(console.file, io.StringIO)
    assert exact.footnotes == ()
    assert _METHOD in console.file.getvalue()
    assert sorted(drawn) == ["ap.png", "learning_curves.png", "run.png"]
    shown = [console.file.getvalue(), render_html(exact), *(text for texts in drawn.values() for text in texts)]
    assert not any(MARK in text for text in shown)
