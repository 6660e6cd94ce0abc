"""The resumable state of a run: everything that decides the next step, in one file that is replaced whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcli.digest import is_intact, sealed
from kdcli.engine.loading.seen import SeenImages
from kdcli.engine.training.guards import ZeroGuard
from kdcli.engine.training.optim import WeightAverage
from kdcli.engine.training.run_folder import STATE_FILE
from kdcli.engine.training.state_check import require_parts, require_progress
from kdcli.engine.training.step import TrainStep
from kdcli.errors import OptionError
from kdcli.files import atomic_save, load_torch

STATE_VERSION = 1


@dataclass(kw_only=True)
class TrainingState:
    """Where a run is, and what it has seen so far."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    step: int = 0  # batches of all epochs that are done
    wall_s: float = 0.0
    best_ap: float | None = None
    best_epoch: int | None = None
    peak_memory_bytes: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # one row an epoch
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch: loss terms, seconds, images
    shares: dict[str, float] = field(default_factory=dict)  # grad_share_* of this epoch
    zeros: dict[str, int] = field(default_factory=dict)
    checked: list[str] = field(default_factory=list)  # terms whose first gradient was looked at

    def epoch_row(self, lr: float, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        """The line of results.csv for the epoch that ends now: means of its steps, AP where it was evaluated."""
        sums = self.sums
        timing = {"seconds", "wait_s", "teacher_s", "images", "steps"}
        return {
            "epoch": self.epoch + 1,
            "lr": lr,
            **{name: value / sums["steps"] for name, value in sums.items() if name not in timing},
            **self.shares,
            "AP": evaluation.get("ap"),
            "AP50": evaluation.get("ap50"),
            "AP75": evaluation.get("ap75"),
            "images_per_s": sums["images"] / sums["seconds"],
            "data_wait_percent": 100 * sums["wait_s"] / sums["seconds"],
            "teacher_percent": 100 * sums["teacher_s"] / sums["seconds"],
            "epoch_s": sums["seconds"],
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a state is made of and goes back into."""

    step: TrainStep
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    guard: ZeroGuard
    seen: Mapping[str, SeenImages]  # of each split


def save_state(
    run: Path, identity: str | None, progress: TrainingState, parts: Parts, seen: Mapping[str, Tensor]
) -> None:
    """Write the state; a kill at any moment leaves the old one or the new one.

    ``identity``: of the run, from its env.json; None for one from before runs had it. ``seen``: of ``SeenImages.to_tensor``.
    """
    progress.zeros = dict(parts.guard.counts)
    average = parts.average
    content = {
        "version": STATE_VERSION,
        "run": identity,
        "progress": vars(progress),
        "module": parts.step.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "scaler": parts.scaler.state_dict(),
        "average": None if average is None else {"state": average.state, "updates": average.updates},
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "seen": dict(seen),
    }
    atomic_save(sealed(content), run / STATE_FILE)


def load_state(run: Path, identity: str | None, parts: Parts, epochs: int) -> TrainingState:
    """Continue from the state of ``run``, or from the start when it was killed before the first one.

    Every part is checked before one is loaded. Raises OptionError when the file is foreign, damaged or of another run.
    """
    path = run / STATE_FILE
    if not path.exists():
        return TrainingState()
    state: object = load_torch(path, what="state")
    if not isinstance(state, dict) or type(state.get("version")) is not int or state["version"] != STATE_VERSION:
        raise OptionError(f"'{path}' was written by another version of kdcli; start the run again")
    try:
        if not is_intact(state):
            raise OptionError("its content does not match its digest")
        require_parts(state, parts.step, parts.optimizer, parts.scaler, parts.average)
        if state.get("run") not in (None, identity):
            raise OptionError("it is of another run")
        progress = TrainingState(**require_progress(state["progress"], epochs))
        for split, seen in parts.seen.items():
            if "seen" in state:
                seen.restore(state["seen"].get(split))
    except OptionError as error:
        raise OptionError(
            f"state '{path}' cannot be gone on from: {error}; copy it again, or start a new run"
        ) from error
    parts.step.load_state_dict(state["module"])
    # of the optimiser its buffers alone: what it is set to follows from the run's options
    settings = parts.optimizer.state_dict()["param_groups"]
    parts.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": settings})
    parts.scaler.load_state_dict(state["scaler"])
    if parts.average is not None:
        parts.average.load(state["average"]["state"], state["average"]["updates"])
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available():
        for number, device_state in enumerate(state["cuda_rng"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, number)
    parts.guard.counts = dict(progress.zeros)
    return progress
