"""SIGTERM and SIGHUP: a training keeps the steps that are done, and goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kdcli.detectors.weights import load_detector
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.runtime.stopping import Stopped, held, stop_is_an_error
from kdcli.engine.training import launch
from kdcli.files import load_torch
from tests.support.selection import matrix
from tests.support.small_runs import run_request


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_is_an_error_after_what_is_held(number: signal.Signals, code: int) -> None:
    done = []

    def work() -> None:
        with stop_is_an_error():
            with held():
                os.kill(os.getpid(), number)
                done.append("the step")
            done.append("the next")

    def loose() -> None:
        with stop_is_an_error():
            os.kill(os.getpid(), number)
            done.append("at once")

    with pytest.raises(Stopped, match=number.name) as stopped:
        work()
    assert done == ["the step"]
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is signal.SIG_DFL
    with pytest.raises(Stopped):
        loose()
    assert done == ["the step"]


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_is_an_error():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Stopping(NullReporter):
    """Sends the signal at the ``at``-th advance of the stage that begins with ``stage``."""

    def __init__(self, stage: str, at: int) -> None:
        self.wanted, self.at, self.now = stage, at, ""

    def stage(self, label: str, total: int) -> None:
        self.now = label

    def advance(self, units: int = 1, info: str = "") -> None:
        if self.now.startswith(self.wanted):
            self.at -= 1
            if self.at == 0:
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.full
@pytest.mark.parametrize(
    ("stage", "at", "steps"), matrix([("epoch 2", 3, 9), ("epoch 1", 7, 6), ("evaluate", 1, 7), ("epoch 1", 1, 0)])
)
def test_a_stopped_training_goes_on(shapes: Path, tmp_path: Path, stage: str, at: int, steps: int) -> None:
    request = run_request("train", shapes)
    launch.start(request, tmp_path / "whole", NullReporter(), overwrite=False)
    with pytest.raises(Stopped), stop_is_an_error():
        launch.start(request, tmp_path / "stopped", Stopping(stage, at), overwrite=False)
    state = load_torch(tmp_path / "stopped" / "weights" / "state.pt", what="state")["progress"]
    assert state["step"] == steps
    launch.resume(tmp_path / "stopped", run_request("train", shapes, workers=1), NullReporter())
    one, other = (load_detector(tmp_path / run)[1].weights_sha256 for run in ("whole", "stopped"))
    assert one == other
