"""What ``cache bench`` says about a store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdcli.cli.main import run
from kdcli.engine.caching.bench import Speed


def test_bench_reads_what_it_is_told(default_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--batch", "4", "--rows", "24", "--workers", "0,1", "--step-ms", "100", "--json"]
    assert run(["cache", "bench", str(default_store), *common]) == 0
    everything = json.loads(capsys.readouterr().out)["speeds"]
    assert run(["cache", "bench", str(default_store), "--method", "rm", *common]) == 0
    few = json.loads(capsys.readouterr().out)["speeds"]
    assert [s["workers"] for s in everything] == [0, 1]
    assert {s["rows"] for s in everything + few} == {24}
    assert all(s["rows_per_s"] > 0 for s in everything + few)
    assert few[0]["megabytes"] < 0.5 * everything[0]["megabytes"]
    assert run(["cache", "bench", str(default_store), *common[:-1]]) == 0
    assert "waiting" in capsys.readouterr().err


def test_the_forecast() -> None:
    slow = Speed(workers=2, rows=100, seconds=1.0, megabytes=1.0)
    assert slow.wait_percent(batch=10, step_s=0.2) == 0  # 0.1 s of reading behind a step
    assert slow.wait_percent(batch=40, step_s=0.2) == pytest.approx(50)
    alone = Speed(workers=0, rows=100, seconds=1.0, megabytes=1.0)
    assert alone.wait_percent(batch=10, step_s=0.1) == pytest.approx(50)  # nothing reads ahead


@pytest.mark.parametrize(
    ("flags", "code"), [(["--workers", "two"], 2), (["--workers", "-1"], 2), (["--method", "bckd"], 3)]
)
def test_wrong_flags(default_store: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int) -> None:
    assert run(["cache", "bench", str(default_store), *flags]) == code
    assert capsys.readouterr().err.startswith("error: ")
