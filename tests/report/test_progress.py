"""The bar of a command: on a terminal alone, with names from files as plain text."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kdcli.report.progress import ConsoleReporter


def test_a_bar_is_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleReporter() as reporter:
        reporter.stage("caching", 10)
        reporter.advance(3, "12 images/s")
    assert capsys.readouterr() == ("", "")
    file = io.StringIO()
    with ConsoleReporter(Console(file=file, force_terminal=True, width=100)) as reporter:
        reporter.stage("caching [x]", 10)
        reporter.advance(4, "12 images/s")
        reporter.message("a\x07 line [b]")
    shown = file.getvalue()
    assert "caching [x]" in shown
    assert "4/10" in shown
    assert "12 images/s" in shown
    assert "a\\x07 line [b]" in shown
