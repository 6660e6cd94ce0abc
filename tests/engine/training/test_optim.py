"""The learning rate against mmdet's two hooks (mmcv 1.x), and what a list of epochs may be."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training import launch, run_config
from kdcli.engine.training.optim import lr_factor
from kdcli.engine.training.run_folder import read_config
from kdcli.errors import OptionError
from kdcli.options import OptimOptions, TrainOptions, build, parse_assignments
from tests.support.small_runs import run_request
from tests.support.stopping import Stop, Stopping, weights


@pytest.mark.parametrize(
    ("steps", "epochs", "drops"),
    [
        ([8, 11], 12, [8, 11]),  # mmdet's schedule_1x
        ([3], 4, [3]),  # VOC: LD's and DeFeat's
        ([1, 2, 3], 4, [1, 2, 3]),
        ([], 4, []),
        (None, 12, [8, 11]),
        (None, 24, [16, 22]),
    ],
)
def test_lr_drops_after_these_epochs(steps: list[int] | None, epochs: int, drops: list[int]) -> None:
    """mmcv's step policy: 0.1 ** (milestones that are at most the number of finished epochs)."""
    options = build(OptimOptions, {"warmup_steps": 0, "steps": steps})
    for epoch in range(epochs):
        expected = 0.1 ** len([d for d in drops if d <= epoch])
        for step in (0, 9):
            assert lr_factor(options, epoch * 10 + step, 10, epochs) == pytest.approx(expected)


def test_warm_up_is_mmdets() -> None:
    """warmup='linear', warmup_iters=500, warmup_ratio=0.001: lr * (1 - (1 - i / 500) * (1 - 0.001)) at iteration i, on 12
    epochs of COCO, where 10 % of all steps are more than 500."""
    options = OptimOptions()
    for i in (0, 1, 137, 250, 499):
        expected = 1 - (1 - i / 500) * (1 - 0.001)
        assert lr_factor(options, i, 7330, 12) == pytest.approx(expected, rel=1e-12)
    assert lr_factor(options, 500, 7330, 12) == 1.0
    short = OptimOptions(warmup_steps=200, steps=(3,))  # DeFeat's VOC configuration
    assert lr_factor(short, 50, 3104, 4) == pytest.approx(1 - (1 - 50 / 200) * (1 - 0.001))
    assert lr_factor(short, 3104 * 3, 3104, 4) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ("steps=[8,12]", r"optim.steps = \[8, 12\]: a run of 12 epochs has none to train after epoch 12"),
        ("steps=[11,8]", r"optim.steps = \[11, 8\]: must be epochs, ascending, from 1 on"),
        ("steps=[8,8]", r"optim.steps = \[8, 8\]: must be epochs, ascending"),
        ("steps=[0,8]", r"optim.steps = \[0, 8\]: must be epochs, ascending, from 1 on"),
        ("steps=[8.5]", r"optim.steps = \[8.5\]: must be whole numbers in brackets, e.g. \[8, 11\]"),
        ("steps=[true]", r"optim.steps = \[True\]: must be whole numbers in brackets"),
        ("steps=8", r"optim.steps = 8: must be whole numbers in brackets"),
        ("steps=8,11", r"optim.steps = '8,11': must be whole numbers in brackets"),
    ],
)
def test_impossible_steps_are_refused(optim: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build(TrainOptions, parse_assignments([f"optim.{optim}"]))


def test_steps_need_the_step_schedule() -> None:
    with pytest.raises(OptionError, match=r"optim.steps = \[8\]: schedule is 'cosine', which has none"):
        build(TrainOptions, parse_assignments(["optim.steps=[8]", "optim.schedule=cosine"]))
    assert build(TrainOptions, parse_assignments(["optim.steps=none", "optim.schedule=cosine"])).optim.steps is None


def test_a_run_with_steps_is_recorded_and_goes_on(shapes: Path, tmp_path: Path) -> None:
    """config.toml holds the list, runs again as it is, and a stopped run goes on with it to the same weights."""
    optim: dict[str, Any] = {"lr": 0.02, "steps": [1]}
    fields = run_request("train", shapes, save_steps=2, optim=optim)
    whole, metrics = launch.start(fields, tmp_path / "whole", NullReporter(), overwrite=False)
    written = tomllib.loads((whole / "config.toml").read_text())
    assert written["optim"]["steps"] == [1]
    assert read_config(whole).optim.steps == (1,)
    assert run_config.from_flags("train", written, {}, None, {}).options().optim.steps == (1,)
    with pytest.raises(Stop):
        launch.start(fields, tmp_path / "run", Stopping(), overwrite=False)
    same = run_config.from_flags("train", {}, {}, None, parse_assignments(["optim.steps=[1]"]))
    _, resumed = launch.resume(tmp_path / "run", same, NullReporter())
    assert weights(resumed) == weights(metrics)
    rates = [line.split(",")[1] for line in (whole / "results.csv").read_text().splitlines()[1:]]
    assert [float(r) for r in rates] == pytest.approx([0.02 * 4 / 16, 0.002 * 4 / 16])
    other = run_config.from_flags("train", {}, {}, None, parse_assignments(["optim.steps=none"]))
    with pytest.raises(OptionError, match=r"refuses changed settings \(optim.steps: \[1\] -> None\)"):
        launch.resume(tmp_path / "run", other, NullReporter())
