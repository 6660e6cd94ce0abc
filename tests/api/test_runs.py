"""Runs, stores and scores from Python are those of the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kdcli
from kdcli.cli.main import run as command
from tests.support.small_runs import CANVAS, STUDENT

SMALL: dict[str, Any] = {"canvas": CANVAS, "epochs": 1, "batch": 4, "workers": 0, "threads": 1, "optim": {"lr": 0.02}}


class Told:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.stages: list[str] = []

    def stage(self, label: str, total: int) -> None:
        """Remember it."""
        self.stages.append(label)

    def advance(self, units: int = 1, info: str = "") -> None:
        """Nothing to remember."""

    def message(self, text: str) -> None:
        """Remember it."""
        self.messages.append(text)


def test_a_store_and_a_student(shapes: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = kdcli.cache_teacher(
        data=shapes, teacher=teacher, method=["rm", "pkd"], out=tmp_path / "store", views="identity", workers=0, threads=1,
        micro_batch=4,
    )  # fmt: skip
    assert store == str(tmp_path / "store")
    assert kdcli.open_store(store).views == ("identity",)
    assert kdcli.cache_teacher(
        data=shapes, teacher=str(teacher), method="rm,pkd", out=store, views="identity", workers=0, threads=1, micro_batch=4
    ) == store  # fmt: skip
    told = Told()
    run, metrics = kdcli.distill(
        data=shapes, cache=Path(store), method=("rm", "pkd"), model=STUDENT, out=tmp_path / "run", progress=told,
        methods={"pkd": {"weight": 2.0}}, **SMALL,
    )  # fmt: skip
    assert run == tmp_path / "run"
    assert metrics == json.loads((run / "metrics.json").read_text())
    assert (run / "plots" / "training.png").is_file()
    assert "[methods.pkd]\nweight = 2.0" in (run / "config.toml").read_text()
    assert told.stages[0] == "epoch 1/1"
    assert any(text.startswith("epoch 1/1  loss") for text in told.messages)
    assert kdcli.distill(resume=run) == (run, metrics)
    scores = kdcli.evaluate(run, data=shapes, workers=0)
    assert scores["ap"] == metrics["ap"]
    detector, meta = kdcli.load_detector(run)
    assert isinstance(detector, kdcli.Detector)
    assert meta.canvas == CANVAS
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def test_train_is_the_command(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, _ = kdcli.train(data=shapes, model="gfl_shufflenet_v2_x0_5", out=tmp_path / "ours", eval_every=2, **SMALL)
    flags = [
        "--canvas",
        CANVAS,
        "--epochs",
        "1",
        "--batch",
        "4",
        "--workers",
        "0",
        "--threads",
        "1",
        "--eval-every",
        "2",
    ]
    theirs = tmp_path / "theirs"
    model = ["--model", "gfl_shufflenet_v2_x0_5", "--set", "optim.lr=0.02"]
    assert command(["train", "--data", str(shapes), *model, *flags, "--out", str(theirs)]) == 0
    assert (ours / "config.toml").read_text() == (theirs / "config.toml").read_text()
    assert sorted(p.name for p in ours.rglob("*")) == sorted(p.name for p in theirs.rglob("*"))
    weights = [torch.load(run / "weights" / "last.pt", weights_only=True)["weights_sha256"] for run in (ours, theirs)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda data, out: kdcli.train(data=data, model="gfl_resnet18"), kdcli.UsageError, "out= is missing"),
    (lambda data, out: kdcli.train(data=data, out=out), kdcli.UsageError, "--model is missing"),
    (lambda data, out: kdcli.train(data=data, out=out, epoch=3), kdcli.OptionError, "'epoch'; did you mean 'epochs'"),
    (lambda data, out: kdcli.train(data=out / "none", model="gfl_resnet18", out=out), kdcli.MissingPathError, "none"),
    (lambda data, out: kdcli.distill(data=data, model="gfl_resnet18", out=out), kdcli.UsageError, "--method is missing"),
    (lambda data, out: kdcli.distill(data=data, method=[3], model="gfl_resnet18", out=out), kdcli.OptionError,
     r"methods = \[3\]: give their names"),
    (lambda data, out: kdcli.train(resume=out, out=out), kdcli.OptionError, "resume=RUN continues RUN"),
    (lambda data, out: kdcli.evaluate(out, data=data), kdcli.MissingPathError, "no such file"),
    (lambda data, out: kdcli.cache_teacher(data=data, teacher=out, method="ld", out=out), kdcli.MissingPathError, "no such"),
    (lambda data, out: kdcli.cache_teacher(data=data, teacher=out, method="ld", out=out, shard="3/2"), kdcli.UsageError,
     "write I/N"),
])  # fmt: skip
def test_errors_are_one_line(call: Any, error: type[kdcli.KDError], message: str, shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(error, match=message) as caught:
        call(shapes, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
