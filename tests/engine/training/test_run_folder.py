"""Runs: the folder, exact repetition, resuming, queues, options that matter and options that must not."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.detectors.weights import load_detector
from kdcli.engine.loading.epoch_order import plan_epoch
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training import launch, run_config
from kdcli.engine.training.optim import WeightAverage, lr_factor, make_optimizer, scaled_lr
from kdcli.engine.training.setup import prepare
from kdcli.engine.training.trainer import Trainer
from kdcli.errors import MissingPathError, OptionError
from kdcli.options import OptimOptions, read_toml
from tests.support.small_runs import CANVAS, STUDENT, run_request
from tests.support.stopping import Stop, Stopping, weights

FILES = {"config.toml", "env.json", "results.csv", "metrics.json", "weights/best.pt", "weights/last.pt"}


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def plain(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One finished plain run."""
    return launch.start(
        run_request("train", shapes), tmp_path_factory.mktemp("runs") / "plain", NullReporter(), overwrite=False
    )


def test_the_run_folder(plain: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = plain
    assert files(folder) == FILES
    rows = (folder / "results.csv").read_text().splitlines()
    assert len(rows) == 3
    assert {"epoch", "lr", "loss_cls", "loss_bbox", "loss_dfl", "AP", "data_wait_percent"} <= set(rows[0].split(","))
    env = json.loads((folder / "env.json").read_text())
    assert env["versions"]["torch"] == torch.__version__.split("+")[0]
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    detector, meta = load_detector(folder)
    assert weights(metrics) == meta.weights_sha256
    assert detector.spec.name == STUDENT["name"]
    assert meta.canvas == CANVAS


def test_config_runs_again_as_it_is(plain: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, metrics = plain
    fields = read_toml(folder / "config.toml")
    again = run_config.from_flags("train", fields, {}, None, {})
    _, repeated = launch.start(again, tmp_path / "again", NullReporter(), overwrite=False)
    assert weights(repeated) == weights(metrics)
    assert tomllib.loads((tmp_path / "again" / "config.toml").read_text()) == fields


def test_workers_do_not_change_the_result(shapes: Path, plain: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, metrics = launch.start(
        run_request("train", shapes, workers=2), tmp_path / "run", NullReporter(), overwrite=False
    )
    assert weights(metrics) == weights(plain[1])


def test_seeds_differ_and_baseline_and_student_see_the_same_pixels(
    shapes: Path, default_store: Path, plain: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, other = launch.start(run_request("train", shapes, seed=1), tmp_path / "seed", NullReporter(), overwrite=False)
    assert weights(other) != weights(plain[1])
    baseline, student = (
        run_request("train", shapes),
        run_request("distill", shapes, cache=str(default_store), method="ld"),
    )
    runs = [prepare(a.options(), frozenset(a.fields), NullReporter()) for a in (baseline, student)]
    plans = [plan_epoch(r.source, r.positions, r.views, seed=0, epoch=3, batch=4) for r in runs]
    assert plans[0] == plans[1]
    for ours, theirs in zip(runs[0].student.state_dict().values(), runs[1].student.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_stopped_run_goes_on_where_it_was(shapes: Path, tmp_path: Path) -> None:
    """Stopped inside an epoch, right after a state was written: the same weights and history as without the stop."""
    fields = run_request("train", shapes, save_steps=2, optim={"lr": 0.02, "ema": True})
    _, whole = launch.start(fields, tmp_path / "whole", NullReporter(), overwrite=False)
    with pytest.raises(Stop):
        launch.start(fields, tmp_path / "run", Stopping(), overwrite=False)
    _, resumed = launch.resume(tmp_path / "run", run_config.from_flags("train", {}, {}, None, {}), NullReporter())
    assert weights(resumed) == weights(whole)
    assert resumed["ap"] == whole["ap"]
    assert files(tmp_path / "run") == FILES


def test_a_run_goes_on_with_a_store_that_moved(
    shapes: Path, default_store: Path, lossless_store: Path, tmp_path: Path
) -> None:
    shutil.copytree(default_store, tmp_path / "store")
    fields = run_request("distill", shapes, method="rm", cache=str(tmp_path / "store"), save_steps=2)
    _, whole = launch.start(fields, tmp_path / "whole", NullReporter(), overwrite=False)
    run = tmp_path / "run"
    with pytest.raises(Stop):
        launch.start(fields, run, Stopping(), overwrite=False)
    (tmp_path / "store").rename(tmp_path / "moved")
    with pytest.raises(MissingPathError, match="does not exist"):
        launch.resume(run, run_config.from_flags("distill", {}, {}, None, {}), NullReporter())
    before = (run / "config.toml").read_bytes()
    with pytest.raises(OptionError, match="store changed since the run began"):
        launch.resume(
            run, run_config.from_flags("distill", {}, {"cache": str(lossless_store)}, None, {}), NullReporter()
        )
    with pytest.raises(OptionError, match=r"optim\.lr: 0\.02 -> 0\.5"):
        launch.resume(run, run_config.from_flags("distill", {}, {}, None, {"optim": {"lr": 0.5}}), NullReporter())
    assert (run / "config.toml").read_bytes() == before
    moved = run_config.from_flags("distill", {}, {"cache": str(tmp_path / "moved")}, None, {})
    _, resumed = launch.resume(run, moved, NullReporter())
    assert weights(resumed) == weights(whole)
    assert read_toml(run / "config.toml")["cache"] == str(tmp_path / "moved")


def test_a_queue_keeps_finished_runs(shapes: Path, tmp_path: Path) -> None:
    fields = run_request("train", shapes, epochs=1)
    first = launch.queue(fields, [0], tmp_path, NullReporter(), overwrite=False)
    stamp = (tmp_path / "seed-0" / "metrics.json").stat().st_mtime_ns
    both = launch.queue(fields, [0, 1], tmp_path, NullReporter(), overwrite=False)
    assert (tmp_path / "seed-0" / "metrics.json").stat().st_mtime_ns == stamp
    assert both[0] == first[0]
    assert [run.name for run, _ in both] == ["seed-0", "seed-1"]


def test_init_from_takes_the_weights(shapes: Path, plain: tuple[Path, dict[str, Any]]) -> None:
    fields = run_request("train", shapes, init_from=str(plain[0]))
    run = prepare(fields.options(), frozenset(fields.fields), NullReporter())
    theirs = load_detector(plain[0])[0].state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in run.student.state_dict().items())


def test_bf16_autocast_and_adamw_train(shapes: Path, tmp_path: Path) -> None:
    fields = run_request(
        "train", shapes, amp="bf16", epochs=1, optim={"name": "adamw", "lr": 1e-3, "schedule": "cosine"}
    )
    _, metrics = launch.start(fields, tmp_path / "run", NullReporter(), overwrite=False)
    assert metrics["epochs"] == 1


def test_every_image_comes_once_an_epoch_in_one_orientation(shapes: Path) -> None:
    fields = run_request("train", shapes, views="identity,hflip,crop-2")
    run = prepare(fields.options(), frozenset(fields.fields), NullReporter())
    seen = []
    for epoch in range(3):
        plan = plan_epoch(run.source, run.positions, run.views, seed=0, epoch=epoch, batch=5)
        assert sorted(position for batch in plan for position, _ in batch) == list(range(24))
        for batch in plan:
            assert len({run.source.geometry(item).canvas for item in batch}) == 1
        seen.append([item for batch in plan for item in batch])
    assert seen[0] != seen[1] != seen[2]
    assert {view for epoch in seen for _, view in epoch} == {"identity", "hflip", "crop-0", "crop-1"}
    for world in (2, 3):
        whole = plan_epoch(run.source, run.positions, run.views, seed=0, epoch=0, batch=6)
        ranks = [
            plan_epoch(run.source, run.positions, run.views, seed=0, epoch=0, batch=6, world=world, rank=r)
            for r in range(world)
        ]
        for k, batch in enumerate(whole):
            joined = [item for r in ranks for item in r[k]]
            assert joined[: len(batch)] == batch
            assert len(joined) == 6


def test_learning_rate() -> None:
    options = OptimOptions(lr=0.01)
    assert scaled_lr(options, 8) == pytest.approx(0.005)
    factors = [lr_factor(options, step, 100, 12) for step in range(1200)]
    assert factors[0] == pytest.approx(0.001)
    assert factors[120] == 1.0  # warm-up: 10 % of 1,200 steps
    assert [factors[e * 100 + 50] for e in (7, 8, 10, 11)] == pytest.approx([1, 0.1, 0.1, 0.01])
    cosine = OptimOptions(schedule="cosine", warmup_steps=0)
    assert lr_factor(cosine, 600, 100, 12) == pytest.approx(0.5)
    with_decay = make_optimizer(torch.nn.Sequential(torch.nn.Linear(2, 2)), OptimOptions(name="adamw", lr=0.01), 16)
    assert [g["weight_decay"] for g in with_decay.param_groups] == [1e-4, 0.0]


def test_weight_average() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    average = WeightAverage(module, 0.5)
    torch.nn.init.ones_(module.weight)
    average.update(module)
    assert average.state["weight"].item() == pytest.approx(1 - 2 / 11)  # the ramp: (1 + 1) / (10 + 1)


def test_two_trainers_do_not_share_state(shapes: Path) -> None:
    fields = run_request("train", shapes)
    one = Trainer(prepare(fields.options(), frozenset(fields.fields), NullReporter()), Path(), NullReporter())
    two = Trainer(prepare(fields.options(), frozenset(fields.fields), NullReporter()), Path(), NullReporter())
    assert one.state is not two.state
    assert one.state.history is not two.state.history
