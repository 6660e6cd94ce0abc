"""A distillation that does nothing, explodes or is not finite stops the run and says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.cli import main
from kdcli.engine.loading.loader import Loader
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training import launch
from kdcli.engine.training.checkpoint import STATE_FILE
from kdcli.engine.training.guards import (
    ZERO_STEPS,
    ZeroGuard,
    gradient_norms,
    require_finite,
    require_sane_gradients,
)
from kdcli.engine.training.optim import check_ownership
from kdcli.engine.training.setup import prepare
from kdcli.errors import GateError, NoSpaceError, OptionError
from kdcli.files import atomic_save
from kdcli.geometry.grid import Grid
from kdcli.methods import LD
from kdcli.methods.base import Pair
from kdcli.options import TrainOptions, build, read_toml
from kdcli.structures import Canvas
from kdcli.tensors import TensorSpec
from tests.support.small_runs import run_request

METHOD = """
import torch
from kdcli.methods.base import Method
from kdcli.tensors import Need

class Mine(Method):
    title = "a test"
    needs = (Need("cls_logits", "main"),)

    def __init__(self, pair, *, factor: float = 1.0, nan_at: int = -1) -> None:
        super().__init__()
        self.factor, self.nan_at, self.calls = factor, nan_at, 0

    def forward(self, student, teacher, batch):
        value = (student["cls_logits@main"] - teacher["cls_logits@main"]).square().sum() * self.factor * 1e-3
        self.calls += 1
        return {"mse": value * (float("nan") if self.calls == self.nan_at else 1.0)}
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    """A method of a user's own, in a file."""
    (tmp_path / "mine.py").write_text(METHOD)
    return f"{tmp_path / 'mine.py'}:Mine"


def run(shapes: Path, store: Path, method: str, out: Path, **options: float) -> None:
    fields = run_request("distill", shapes, cache=str(store), method=method, methods={"mine": options}, epochs=12)
    launch.start(fields, out, NullReporter(), overwrite=False)


def test_a_users_method_trains(shapes: Path, lossless_store: Path, mine: str, tmp_path: Path) -> None:
    fields = run_request("distill", shapes, cache=str(lossless_store), method=mine, methods={"mine": {"factor": 0.01}})
    folder, metrics = launch.start(fields, tmp_path / "run", NullReporter(), overwrite=False)
    assert metrics["epochs"] == 2
    header = (folder / "results.csv").read_text().splitlines()[0].split(",")
    assert {"mine_mse", "grad_share_mine_mse", "grad_share_detection"} <= set(header)


def test_nan_stops_before_the_optimiser_moves(shapes: Path, lossless_store: Path, mine: str, tmp_path: Path) -> None:
    with pytest.raises(
        GateError, match=r"step 3: the loss is not finite \(.*mine_mse=nan.*the weights were not changed"
    ):
        run(shapes, lossless_store, mine, tmp_path / "run", factor=0.01, nan_at=4)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_huge_gradient_stops_at_the_first_step(shapes: Path, lossless_store: Path, mine: str, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"mine_mse: its first gradient norm is .* times that of the detection loss"):
        run(shapes, lossless_store, mine, tmp_path / "run", factor=1e6)
    assert not (tmp_path / "run" / STATE_FILE).exists()


class Listening(NullReporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def test_a_huge_gradient_can_be_allowed(shapes: Path, lossless_store: Path, mine: str, tmp_path: Path) -> None:
    """The stopped run goes on with another limit, to the weights of one that was begun with it; said once, recorded."""
    wanted = {"cache": str(lossless_store), "method": mine, "methods": {"mine": {"factor": 1e4}}}
    refused = run_request("distill", shapes, **wanted)
    with pytest.raises(
        GateError, match=r"the limit is 100; lower .*--set mine.weight=.*allow it with --gradient-limit 0"
    ):
        launch.start(refused, tmp_path / "run", NullReporter(), overwrite=False)
    assert main.run(["distill", "--resume", str(tmp_path / "run")]) == 6
    assert main.run(["distill", "--resume", str(tmp_path / "run"), "--gradient-limit", "0"]) == 0
    assert read_toml(tmp_path / "run" / "config.toml")["gradient_limit"] == 0.0
    heard = Listening()
    begun = run_request("distill", shapes, **wanted, gradient_limit=0.0)
    _, metrics = launch.start(begun, tmp_path / "begun", heard, overwrite=False)
    said = [m for m in heard.messages if "first gradient norm" in m]
    assert len(said) == 1
    assert re.match(
        r"warning: mine_mse: .* times that of the detection loss \(.*\); --gradient-limit 0 allows it", said[0]
    )
    resumed = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert resumed["weights_sha256"] == metrics["weights_sha256"]


def test_the_gradient_limit() -> None:
    """100 times detection's unless said otherwise; a lower one stops earlier, a higher one warns."""
    assert TrainOptions().gradient_limit == 100.0
    norms, option = {"ld_kd": 290.0}, {"ld_kd": "ld.kd_weight"}
    assert require_sane_gradients(norms, 2.9, option, 100.0) == []
    with pytest.raises(GateError, match=r"ld_kd: its first gradient norm is 290, 290 times .* \(1\), the limit is 100"):
        require_sane_gradients(norms, 1.0, option, 100.0)
    with pytest.raises(GateError, match="the limit is 99; lower its weight"):
        require_sane_gradients(norms, 2.9, option, 99.0)
    (said,) = require_sane_gradients(norms, 1.0, option, 300.0)
    assert said.endswith("290 times that of the detection loss (1); --gradient-limit 300 allows it")
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match=r"gradient_limit = .*: must be at least 0; 0 is no limit"):
            build(TrainOptions, {"gradient_limit": wrong})


def test_a_silent_zero_stops_the_run(shapes: Path, lossless_store: Path, mine: str, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=rf"mine_mse was exactly 0 for {ZERO_STEPS} steps"):
        run(shapes, lossless_store, mine, tmp_path / "run", factor=0.0)


def test_zeros_with_an_empty_region_do_not_count() -> None:
    guard = ZeroGuard()
    for step in range(3 * ZERO_STEPS):
        guard.check({"rm_cls": 0.0}, {"rm_cls": False}, step)
    for step in range(ZERO_STEPS - 1):
        guard.check({"rm_cls": 0.0}, {"rm_cls": True}, step)
    guard.check({"rm_cls": 0.1}, {"rm_cls": True}, 0)
    assert guard.counts == {"rm_cls": 0}


def test_finite_check_names_step_and_terms() -> None:
    require_finite({"a": 1.0, "b": -2.0}, 0)
    for bad in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(GateError, match=r"step 7: .*a=1, b="):
            require_finite({"a": 1.0, "b": bad}, 7)


def test_gradient_norms_are_those_of_each_term_alone() -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    other = torch.nn.Parameter(torch.tensor([1.0]))
    terms = {"square": 0.5 * weight.square().sum(), "linear": 2 * other.sum(), "none": torch.zeros(())}
    assert gradient_norms([weight, other], terms) == {"square": 5.0, "linear": 2.0, "none": 0.0}


def test_a_disk_that_fills_up_while_weights_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save hides the full disk behind an error of its zip writer."""
    import builtins
    import errno
    import io

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 20_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    target = tmp_path / "weights.pt"
    target.write_bytes(b"the weights of before")
    monkeypatch.setattr(builtins, "open", lambda path, mode: Full(path, mode))
    with pytest.raises(NoSpaceError):
        atomic_save({"weight": torch.zeros(100_000)}, target)
    monkeypatch.undo()
    assert target.read_bytes() == b"the weights of before"
    assert [f.name for f in tmp_path.iterdir()] == ["weights.pt"]


def test_one_class_has_no_class_term(shapes: Path) -> None:
    specs = {"cls_logits": TensorSpec("anchor", (1,)), "box_distribution": TensorSpec("anchor", (4, 17))}
    method = LD(Pair(specs, specs, Grid(), Canvas(96, 128), "gfl"))
    assert method.kd_weight == 0.0


def test_random_numbers_of_a_run_do_not_depend_on_its_loaders(shapes: Path) -> None:
    """A resumed run makes new loaders; torch's random state must not notice."""
    fields = run_request("train", shapes)
    run = prepare(fields.options(), frozenset(fields.fields), NullReporter())
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(Loader(run.source, workers).batches([[(0, "identity")], [(1, "hflip")]]))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("field", ["epochs", "batch", "eval_every", "save_steps", "micro_batch"])
def test_impossible_numbers_are_refused(field: str) -> None:
    with pytest.raises(OptionError, match=f"{field} = 0: must be at least 1"):
        build(TrainOptions, {field: 0})


def test_an_unowned_adapter_is_found() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(AssertionError, match=r"1\.weight"):
        check_ownership(module, torch.optim.SGD(module[0].parameters(), lr=0.1))


def test_both_or_no_teacher_is_refused(shapes: Path, lossless_store: Path, teacher: Path, tmp_path: Path) -> None:
    for side in ({}, {"cache": str(lossless_store), "teacher": str(teacher)}):
        with pytest.raises(OptionError, match="either --cache STORE or --teacher CKPT"):
            launch.start(
                run_request("distill", shapes, method="ld", **side), tmp_path / "run", NullReporter(), overwrite=False
            )
