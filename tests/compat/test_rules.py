"""Runs that began under the first edition of the rules (commit 45b461e, in ``made_by_45b461e``) go on under their own."""

from __future__ import annotations

import csv
import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdcli.cli.main import run
from kdcli.detectors.weights import load_detector
from tests.compat import tiny_backbone

pytestmark = pytest.mark.filterwarnings("ignore:head of . channels. GroupNorm:UserWarning")

MADE = Path(__file__).parent / "made_by_45b461e"
SHAPES = Path(__file__).parent / "made_by_87eafca" / "shapes"
PLACE = "/tmp/kdcli-compat"


@pytest.fixture(scope="module", autouse=True)
def _backbone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        tiny_backbone.install(patch)
        yield


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A copy of everything, whose config.toml files name it."""
    folder = Path(shutil.copytree(MADE, tmp_path / "made"))
    shutil.copytree(SHAPES, folder / "shapes")
    for name in ("norms_killed", "pfi_killed"):
        (folder / name / "plots").mkdir()
        weights = folder / name / "weights"
        shutil.copy(weights / "last.pt", weights / "best.pt")
        config = folder / name / "config.toml"
        config.write_text(config.read_text().replace(PLACE, str(folder)))
    return folder


def column(folder: Path, name: str) -> list[float]:
    """A column of results.csv."""
    return [float(row[name]) for row in csv.DictReader((folder / "results.csv").read_text().splitlines())]


def require_frozen(folder: Path, made: Path) -> None:
    """Every number of the backbone's batch norms is that of the pretrained file, bit for bit."""
    pretrained = torch.load(made / "tiny.pth", weights_only=True)
    ours = load_detector(folder)[0].backbone.state_dict()  # type: ignore[operator, union-attr]
    norms = {k.rsplit(".", 1)[0] for k in ours if k.endswith("running_mean")}
    assert len(norms) == 5
    assert all(torch.equal(v, pretrained[k]) for k, v in ours.items() if k.rsplit(".", 1)[0] in norms)
    assert not torch.equal(ours["c5.0.weight"], pretrained["c5.0.weight"])


def test_frozen_batch_norms_stay_frozen(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    folder = made / "norms_killed"
    assert run(["train", "--resume", str(folder)]) == 0
    said = capsys.readouterr().err
    assert "model.bn = frozen stays, as auto was then: scales and shifts are fixed; auto is now norm_eval" in said
    for name in ("loss_cls", "loss_bbox", "loss_dfl", "loss"):
        assert column(folder, name) == pytest.approx(column(MADE / "norms", name), rel=0.02, abs=1e-5), name
    require_frozen(folder, made)
    assert tomllib.loads((folder / "config.toml").read_text()).get("rules", 1) == 1
    capsys.readouterr()
    assert run(["train", "--resume", str(folder)]) == 0  # finished: nothing is left to say
    assert "model.bn" not in capsys.readouterr().err


def test_pfi_keeps_its_loss(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    """300 on the mean over 8 classes x 9 anchors, squared, is 300 / 72^2 = 0.05787 on their sum; flags say 300 as before."""
    folder = made / "pfi_killed"
    assert run(["distill", "--resume", str(folder), "--method", "pfi", "--set", "pfi.weight=300.0"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "pfi.weight = 300 stays the same loss" in said
    assert "mean over a cell's 72 outputs, for their sum, as now, it is 0.05787" in said
    for name in ("loss_cls", "loss_bbox", "pfi_loss", "loss"):
        assert column(folder, name) == pytest.approx(column(MADE / "pfi", name), rel=0.02, abs=1e-5), name
    assert tomllib.loads((folder / "config.toml").read_text())["methods"]["pfi"]["weight"] == 300.0


def test_an_old_config_runs_again(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    """A new run from it has the old settings in today's numbers, and says what is no longer the default."""
    old = made / "norms_killed" / "config.toml"
    assert run(["train", "--config", str(old), "--out", str(tmp_path / "run")]) == 0
    assert "model.bn = frozen stays" in capsys.readouterr().err
    written = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert (written["rules"], written["model"]["bn"]) == (2, "frozen")
    assert column(tmp_path / "run", "loss") == pytest.approx(column(MADE / "norms", "loss"), rel=0.02)
    require_frozen(tmp_path / "run", made)
    capsys.readouterr()
    assert run(["train", "--config", str(tmp_path / "run" / "config.toml"), "--out", str(tmp_path / "again")]) == 0
    assert "stays" not in capsys.readouterr().err
    metrics = [json.loads((tmp_path / n / "metrics.json").read_text())["weights_sha256"] for n in ("run", "again")]
    assert metrics[0] == metrics[1]
