"""Gates: worse fails, and so does what cannot be answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcli.cli.main import run
from kdcli.errors import GateError
from kdcli.report.gates import require_ap, require_reachable

MakeRun = Callable[..., Path]


def gate(capsys: pytest.CaptureFixture[str], *runs: Path) -> tuple[int, str]:
    """Exit code of ``compare --fail-if-worse`` and its last line."""
    capsys.readouterr()
    code = run(["compare", *map(str, runs), "--fail-if-worse", "--json"])
    lines = capsys.readouterr().err.strip().splitlines()
    return code, lines[-1] if lines else ""


def test_better_passes_and_worse_fails(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_run("base", ap=30.0)
    assert gate(capsys, base, make_run("better", ap=31.0, method=["ld"])) == (0, "")
    assert gate(capsys, base, make_run("equal", ap=30.0, method=["rm"])) == (0, "")
    assert gate(capsys, base, make_run("worse", ap=29.0, method=["pfi"])) == (6, "error: below the baseline: pfi")


def test_without_a_baseline_or_a_student_it_fails(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    student, base = make_run("student", method=["ld"]), make_run("base")
    code, line = gate(capsys, student)
    assert code == 6
    assert "cannot be answered: there is no baseline" in line
    code, line = gate(capsys, base)
    assert code == 6
    assert "cannot be answered" in line
    capsys.readouterr()
    assert run(["compare", str(base), "--baseline", str(base), "--fail-if-worse"]) == 6
    assert "nothing but the baseline" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["unfinished", "cut", "nan", "null", "text", "huge"])
def test_a_student_without_a_sound_ap_fails(make_run: MakeRun, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    base, student = make_run("base", ap=30.0), make_run("student", ap=40.0, method=["ld"])
    make_run("other", ap=41.0, seed=1, method=["ld"])
    file = student / "metrics.json"
    content = file.read_text()
    if damage == "unfinished":
        file.unlink()
    elif damage == "cut":
        file.write_text(content[: len(content) // 2])
    else:
        value = {"nan": float("nan"), "null": None, "text": "40", "huge": 1e300}[damage]
        file.write_text(json.dumps({**json.loads(content), "ap": value}))
    code, line = gate(capsys, base, student, base.parent / "other")
    assert code == 6
    assert "cannot be answered" in line
    assert str(student) in line
    capsys.readouterr()
    assert run(["compare", str(base), str(student), "--json"]) == 0  # without the gate it is left out, and said
    out, err = capsys.readouterr()
    assert [Path(left["path"]).name for left in json.loads(out)["unfinished"]] == ["student"]
    assert err.startswith(f"left out: {student}: ")


def test_an_ap_that_nothing_is_below_is_no_gate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["eval", str(tmp_path / "none.pt"), "--data", str(tmp_path), "--min-ap", "nan"]) == 6
    assert "no AP can be compared with it" in capsys.readouterr().err
    require_reachable(0.0)
    require_reachable(None)
    require_ap(None, None)
    require_ap(30.0, 30.0)
    with pytest.raises(GateError, match=r"AP 29\.9 is below --min-ap 30"):
        require_ap(29.9, 30.0)
    with pytest.raises(GateError, match="has no ground truth"):
        require_ap(None, 0.0)
