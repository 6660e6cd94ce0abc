"""A run goes on from what it wrote, or says in one line why it does not: damaged states, files and images."""

from __future__ import annotations

import json
import random
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from PIL import Image

from kdcli.digest import digest_of
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training import launch, run_config, run_folder
from kdcli.engine.training import trainer as trainer_module
from kdcli.engine.training.checkpoint import STATE_FILE, load_state
from kdcli.engine.training.setup import prepare
from kdcli.engine.training.trainer import Trainer
from kdcli.errors import KDError, OptionError, StoreError
from kdcli.options import to_plain
from tests.support.damage import BROKEN, NESTED, as_json, flips, other_values
from tests.support.small_runs import run_request
from tests.support.stopping import Stop, Stopping, weights

NOTHING = run_config.from_flags("train", {}, {}, None, {})
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def killed(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its fifth step, with a state of its fourth."""
    run = tmp_path_factory.mktemp("runs") / "killed"
    request = run_request("train", shapes, save_steps=2, optim={"lr": 0.02, "ema": True})
    with pytest.raises(Stop):
        launch.start(request, run, Stopping(), overwrite=False)
    return run


@pytest.fixture(scope="module")
def trainer(killed: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """One that states can be loaded into, with a folder of its own."""
    run = Path(shutil.copytree(killed, tmp_path_factory.mktemp("states") / "run"))
    options = run_folder.read_config(run)
    made = Trainer(prepare(options, frozenset(to_plain(options)), NullReporter()), run, NullReporter())
    made.identity = run_folder.read_env(run)["digest"]
    return made


class _Reached(Exception):
    """The files of the run were taken."""


def outcome(attempt: Callable[[], Any]) -> Any:
    """What it returns, or the error that a user may see."""
    try:
        return attempt()
    except (KDError, _Reached) as error:
        return error


def loaded(trainer: Trainer) -> str:
    """A digest of everything that was loaded from the state of a trainer's run."""
    progress = load_state(trainer.run, trainer.identity, trainer.parts, trainer.options.epochs)
    assert trainer.average is not None
    return digest_of(
        {
            "progress": vars(progress),
            "module": trainer.step.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "average": trainer.average.state,
            "seen": {split: seen.to_tensor() for split, seen in trainer.parts.seen.items()},
        }
    )


@pytest.mark.parametrize("count", [15, pytest.param(300, marks=pytest.mark.full)])
def test_a_flipped_bit_is_never_loaded(trainer: Trainer, killed: Path, count: int) -> None:
    data = (killed / STATE_FILE).read_bytes()
    (trainer.run / STATE_FILE).write_bytes(data)
    whole = loaded(trainer)
    refused = 0
    for changed in flips(data, count, random.Random(count)):
        (trainer.run / STATE_FILE).write_bytes(changed)
        found = outcome(lambda: loaded(trainer))
        if isinstance(found, KDError):
            assert found.exit_code == 3
            assert str(trainer.run / STATE_FILE) in str(found)
            assert "\n" not in str(found)
            refused += 1
        else:
            assert found == whole  # in bytes that say nothing
    assert refused > 1.5 * count


def shorten(state: dict[str, Any]) -> None:
    buffers = state["optimizer"]["state"][0]
    buffers["momentum_buffer"] = buffers["momentum_buffer"].reshape(-1)[:-1]


def narrow(state: dict[str, Any]) -> None:
    name = next(iter(state["module"]))
    state["module"][name] = state["module"][name].half()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (shorten, "momentum_buffer of parameter 0 is"),
        (narrow, "it is of another student"),
        (lambda s: s["module"].popitem(), "it is of another student"),
        (lambda s: s["average"]["state"].popitem(), "it is of another average"),
        (lambda s: s.update(average=None), "it has no average of the weights, the run an"),
        (lambda s: s["optimizer"]["param_groups"][0]["params"].pop(), "its optimiser is of other parameters"),
        (lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)), "its optimiser is not SGD"),
        (lambda s: s.update(rng=s["rng"][:-1]), "its random state is none"),
        (lambda s: s.update(rng=s["rng"].float()), "its random state is none"),
        (lambda s: s["scaler"].update(scale=1.0), "gradient scale"),
        (lambda s: s["progress"].update(epoch=1), "it has 1 of 2 epochs, and results of 0"),
        (lambda s: s["progress"].update(batch="3"), "its batch is no value of that field"),
        (lambda s: s["progress"].pop("zeros"), "its progress does not have the fields"),
        (lambda s: s["progress"]["sums"].pop("steps"), "its sums of the epoch are not complete"),
        (lambda s: s.pop("rng"), "its parts are not those"),
        (lambda s: s.update(seen={}), "its parts are not those"),
    ],
)
def test_parts_that_do_not_fit_are_found_without_a_digest(
    trainer: Trainer, killed: Path, edit: Edit, words: str
) -> None:
    """As in a state of an earlier kdcli."""
    state = torch.load(killed / STATE_FILE, weights_only=True)
    for name in ("run", "seen", "digest"):
        del state[name]
    torch.save(state, trainer.run / STATE_FILE)
    load_state(trainer.run, trainer.identity, trainer.parts, trainer.options.epochs)
    before = digest_of([trainer.step.state_dict(), trainer.optimizer.state_dict()])
    edit(state)
    torch.save(state, trainer.run / STATE_FILE)
    with pytest.raises(OptionError, match=words):
        load_state(trainer.run, trainer.identity, trainer.parts, trainer.options.epochs)
    assert digest_of([trainer.step.state_dict(), trainer.optimizer.state_dict()]) == before


def test_a_state_of_another_run_is_refused(trainer: Trainer, killed: Path) -> None:
    (trainer.run / STATE_FILE).write_bytes((killed / STATE_FILE).read_bytes())
    loaded(trainer)
    with pytest.raises(OptionError, match="it is of another run"):
        load_state(trainer.run, "0" * 64, trainer.parts, trainer.options.epochs)


@pytest.mark.parametrize("share", [0.03, pytest.param(1.0, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ["config.toml", "env.json", "metrics.json"])
def test_damaged_files_end_a_resume_in_one_line(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, share: float
) -> None:
    """Whatever a file holds: what is taken as whole says what the run began with."""

    def reached(*_: object) -> None:
        raise _Reached

    monkeypatch.setattr(launch, "prepare", reached)
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    whole = {"ap": 1.0, "epochs": 2, "wall_s": 3.0, "per_class": {"cat": 1.0}, "approximations": ["x"]}
    data = as_json(whole) if name == "metrics.json" else (run / name).read_bytes()
    table = tomllib.loads(data.decode()) if name == "config.toml" else json.loads(data)
    draw = random.Random(5)
    cases = [*BROKEN, *NESTED, *flips(data, 40, draw)]
    for changed in other_values(table):
        if draw.random() < share:
            try:
                cases.append(tomli_w.dumps(changed).encode() if name == "config.toml" else as_json(changed))
            except (TypeError, ValueError):
                continue  # TOML has no null and no lone surrogate
    before = run_folder.read_config(run)
    for case in cases:
        (run / name).write_bytes(case)
        found = outcome(lambda: launch.resume(run, NOTHING, NullReporter()))
        if isinstance(found, _Reached):
            assert run_folder.read_config(run).optim == before.optim
            assert run_folder.read_config(run).seed == before.seed
        elif isinstance(found, KDError):
            assert found.exit_code == 3
            assert "\n" not in str(found)
            assert str(run) in str(found)
        else:
            assert {"ap", "epochs", "wall_s"} <= found[1].keys()


def test_a_folder_in_the_place_of_a_file(killed: Path, tmp_path: Path) -> None:
    for name in ("config.toml", "env.json", "metrics.json", str(STATE_FILE)):
        run = Path(shutil.copytree(killed, tmp_path / Path(name).stem))
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()
        with pytest.raises(KDError, match=Path(name).name) as caught:
            launch.resume(run, NOTHING, NullReporter())
        assert caught.value.exit_code == 3


def test_the_best_weights_have_to_be_there(killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later epoch may not be better: the run would end without them."""
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    real = trainer_module.load_state

    def after_an_epoch(*arguments: Any) -> Any:
        state = real(*arguments)
        state.best_ap, state.best_epoch = 1.0, 1
        return state

    monkeypatch.setattr(trainer_module, "load_state", after_an_epoch)
    with pytest.raises(OptionError, match=r"best\.pt' of epoch 1 is missing; put it back"):
        launch.resume(run, NOTHING, NullReporter())


def test_a_setting_that_was_changed_by_hand_is_refused(killed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("lr = 0.02", "lr = 0.03"))
    with pytest.raises(OptionError, match="other settings than when the run began"):
        launch.resume(run, NOTHING, NullReporter())


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_that_changed_are_refused_by_name(shapes: Path, tmp_path: Path, split: str) -> None:
    """Re-encoded while the run lay still: by the first process that reads one again, before it trains on it."""
    data = Path(shutil.copytree(shapes, tmp_path / "data"))
    run = tmp_path / "run"

    class StopLate(Stopping):
        def advance(self, units: int = 1, info: str = "") -> None:
            self.steps += bool(info)
            if self.steps == 8:  # in the second epoch: all images were read
                raise Stop

    with pytest.raises(Stop):
        launch.start(run_request("train", data, save_steps=2), run, StopLate(), overwrite=False)
    again = Path(shutil.copytree(run, tmp_path / "again"))
    image = sorted((data / split).iterdir())[2]
    with Image.open(image) as opened:
        pixels = opened.convert("RGB")
    before = image.read_bytes()
    pixels.rotate(180).save(image)
    with pytest.raises(StoreError, match=rf"image 3 .*{image.name}.* its bytes changed") as caught:
        launch.resume(run, NOTHING, NullReporter())
    assert caught.value.exit_code == 4
    image.write_bytes(before)
    _, whole = launch.resume(again, NOTHING, NullReporter())
    _, resumed = launch.resume(run, NOTHING, NullReporter())
    assert weights(resumed) == weights(whole)
