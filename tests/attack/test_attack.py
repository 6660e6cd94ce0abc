"""A few cases of each kind of attack; by the thousand they are run by hand: see docs/results/attacks.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CASES = 6  # of each of eight kinds


@pytest.mark.full
def test_nothing_damaged_passes_and_no_kill_leaves_anything(tmp_path_factory: pytest.TempPathFactory) -> None:
    """In a process of its own, which has one thread and so may fork."""
    out = str(tmp_path_factory.mktemp("a"))  # short: the length of error lines, which name paths, is judged
    line = [sys.executable, "-m", "tests.attack", "all", "--cases", str(CASES), "--out", out]
    done = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [
        row.strip("| ").split(" | ") for row in done.stdout.splitlines() if row.startswith("| ") and "---" not in row
    ]
    assert [row[0] for row in rows[1:]] == [
        "stores", "checkpoints", "images", "data", "runs", "options", "every-byte", "kills",
    ]  # fmt: skip
    assert all(
        int(row[2]) >= CASES - 1 for row in rows[1:]
    )  # commands that were run; a damage may have changed nothing
