"""Command lines of small runs, and those that must be refused."""

from __future__ import annotations

import pytest

from kdcli.cli.main import run
from tests.support.small_runs import CANVAS

SMALL = [
    "--canvas", CANVAS, "--epochs", "1", "--batch", "4", "--workers", "0", "--threads", "1",
    "--set", "model.fpn_channels=32", "--set", "model.tower_convs=1",
]  # fmt: skip
STUDENT = ["--model", "gfl_shufflenet_v2_x0_5", *SMALL]


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """Run a command line that must fail with ``code``; returns its one line."""
    capsys.readouterr()
    assert run([str(a) for a in arguments]) == code
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert lines[-1].startswith("error: "), err
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert "Traceback" not in err
    assert out == ""
    return lines[-1]
