"""The benchmarks run to their end, on a few drawn images: what they say at this size means nothing, only that they say it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--canvas", "128x160", "--rounds", "1"]


def run(script: str, *arguments: str) -> Any:
    """The JSON that a benchmark prints."""
    command = [sys.executable, str(FOLDER / script), *SMALL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow  # 70 s
def test_stores_reads_and_trains_from_every_format(tmp_path: Path) -> None:
    found = run("stores.py", "--out", str(tmp_path), "--rows", "4", "--batch", "2", "--steps", "1")
    assert found["methods"].keys() == {"ld", "pfi"}
    assert (tmp_path / "stores.md").read_text().count("`.npy` an image") >= 2
    for line in found["targets"]:
        assert line["measured"] > 0


@pytest.mark.full
def test_write_cost_compares_both_passes(tmp_path: Path) -> None:
    found = run("write_cost.py", "--out", str(tmp_path), "--rows", "4", "--method", "ld", "pfi", "--profile")
    for measured in found["methods"].values():
        assert measured["cached_over_bare"]["value"] > 0
        assert measured["profile"]["ms_a_row_clock_processors"]["teacher: forward"][0] > 0


@pytest.mark.full
def test_step_cost_compares_all_ways(tmp_path: Path) -> None:
    some = ("--images", "4", "--batch", "2", "--steps", "1", "--methods", "ld", "--wait-steps", "2", "--workers", "1")
    found = run("step_cost.py", "--out", str(tmp_path), *some)
    measured = found["methods"]["ld"]
    assert measured["step_ms"].keys() == {"plain", "cached", "memory", "live", "forward"}
    assert measured["live_over_cached"]["value"] > 0
    # one step of four tiny images beside other tests: the stored one may well be the slower, and then nothing is paid back
    payback = measured["payback"]
    assert payback["write_s"] > 0
    assert (payback["epochs"]["value"] is not None) == (payback["saved_s_an_epoch"] > 0)
