"""Tables show names from files as plain text, fit narrow terminals and stay off stdout."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from kdcli.engine.evaluation.coco_metrics import Metrics
from kdcli.report.compare import compare, load_runs
from kdcli.report.console import (
    human_console,
    say,
    show_comparison,
    table_of_comparison,
    table_of_metrics,
)
from kdcli.report.text import duration, plain, size, spelled, with_interval

MakeRun = Callable[..., Path]


def _shown(table: Table, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_comparison_table_has_teacher_baseline_and_difference(make_run: MakeRun) -> None:
    for seed, (base, ld) in enumerate([(40.0, 42.0), (44.0, 46.2), (48.0, 49.8)]):
        make_run(f"base-{seed}", ap=base, seed=seed)
        folder = make_run(f"ld-{seed}", ap=ld, seed=seed, method=["ld"], metrics={"teacher_ap": 54.0})
    make_run("approx", ap=43.0, method=["pfi"], metrics={"approximations": ["pfi-8-channels"]})
    text = _shown(table_of_comparison(compare(load_runs([folder.parent]))))
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["teacher"][2:5] == ["54.0", "-", "+10.0"]
    assert rows["baseline"][1:6] == ["3", "44.0", "±", "9.9", "4.0"]
    assert rows["ld"][6:9] == ["+2.0", "±", "0.5"]
    assert "≈ pfi-8-channels" in text
    assert "19.0 MB" in text
    assert "900 MB" in text
    assert "1.23 M" in text
    assert "80 s" in text


@pytest.mark.parametrize("width", [80, 160])
def test_nothing_is_cut_off(make_run: MakeRun, width: int) -> None:
    make_run("base", ap=40.0)
    make_run("half", finished=False, seed=4)
    folder = make_run("a", ap=42.0, method=["ld"], tables={"ld": {"temperature": 5.0}})
    console = Console(file=io.StringIO(), width=width)
    show_comparison(console, compare(load_runs([folder.parent])))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for word in (
        "baseline",
        "+2.0",
        "1.23 M",
        "900 MB",
        "19.0 MB",
        "left out",
        "unfinished",
        "note:",
        "ld.temperature",
    ):
        assert word in text, word
    assert "…" not in text


def test_class_names_are_text_not_markup() -> None:
    names = ("[red]evil[/red]", "a\x1b[31mb", "two\nlines", "[/]")
    metrics = Metrics(
        ap=50.0, ap50=70.0, ap75=60.0, ap_s=None, ap_m=40.0, ap_l=55.0, ar=65.0,
        per_class=dict.fromkeys(names, 12.34),
    )  # fmt: skip
    text = _shown(table_of_metrics(metrics, more={"images/s": "61.0", "[b]": "x"}))
    assert "[red]evil[/red]" in text
    assert r"a\x1b[31mb" in text
    assert r"two\nlines" in text
    assert "[/]" in text
    assert "\x1b" not in text
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert ["AP_S", "-"] in lines
    assert ["AR", "65.0"] in lines
    assert ["images/s", "61.0"] in lines


def test_human_output_goes_to_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    human_console().print("hello " * 20)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_stays_one_line_in_a_pipe(terminal: bool) -> None:
    """Where COLUMNS is set too, as it is in many jobs that have no terminal."""
    out = io.StringIO()
    say(Console(file=out, width=40, force_terminal=terminal, no_color=True), "[b] long " * 9, "[b]")
    lines = out.getvalue().splitlines()
    if terminal:
        assert max(len(line) for line in lines) <= 40
    else:
        assert lines == ["[b] long " * 9, "[b]"]


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert human_console().no_color


def test_spelling_of_numbers() -> None:
    assert [size(v) for v in (None, 12, 1_340, 999_600, 19e6, 3.2e12)] == [
        "-", "12 B", "1.3 kB", "1.0 MB", "19.0 MB", "3.2 TB",
    ]  # fmt: skip
    assert [duration(v) for v in (None, 0.42, 82.4, 250, 11_100)] == ["-", "0.4 s", "82 s", "4 min 10 s", "3 h 05 min"]
    assert with_interval(42.72, 0.41) == "42.7 ± 0.4"
    assert with_interval(2.0, None, plus=True) == "+2.0"
    assert [spelled(v) for v in (None, True, ["ld", "pfi"], 0.5)] == ["-", "true", "ld, pfi", "0.5"]
    assert plain("a\u202eb\x00c\ud800") == r"a\u202eb\x00c\ud800"
