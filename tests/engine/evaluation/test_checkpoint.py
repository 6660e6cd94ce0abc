"""Scoring a checkpoint from Python: the numbers and files of ``kdcli eval``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdcli.cli.main import run
from kdcli.engine.evaluation.checkpoint import evaluate_checkpoint, write_scores
from kdcli.errors import DataError
from tests.support.small_runs import CANVAS


def test_what_it_finds_is_what_the_command_prints(
    shapes: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = evaluate_checkpoint(teacher, shapes, workers=0, device="cpu")
    write_scores(tmp_path / "ours", scores)
    out = ["--out", str(tmp_path / "theirs")]
    assert run(["eval", str(teacher), "--data", str(shapes), "--workers", "0", "--device", "cpu", "--json", *out]) == 0
    printed = json.loads(capsys.readouterr().out)
    ours = scores.to_json()
    assert list(ours) == list(printed)
    assert ours | {"images_per_s": 0} == printed | {"images_per_s": 0}  # a time
    assert (scores.images, scores.canvas, scores.checkpoint) == (6, CANVAS, teacher)
    detections = [(tmp_path / side / "detections.json").read_bytes() for side in ("ours", "theirs")]
    assert detections[0] == detections[1]
    assert json.loads((tmp_path / "ours" / "metrics.json").read_text()) == ours


def test_another_data_set_is_refused(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    root = tmp_path / "data" / "annotations"
    root.mkdir(parents=True)
    (tmp_path / "data" / "val").mkdir()
    content = json.loads((shapes / "annotations" / "val.json").read_text())
    content["categories"][0]["name"] = "blob"
    (root / "val.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="evaluate on the data set that it was trained for"):
        evaluate_checkpoint(teacher, tmp_path / "data", workers=0)
