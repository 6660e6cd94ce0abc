"""The resumable state of a run: everything that decides the next step, in one file that is replaced whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdcli.engine.training.guards import ZeroGuard
from kdcli.engine.training.optim import WeightAverage
from kdcli.engine.training.run_folder import STATE_FILE
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


def save_state(
    run: Path,
    progress: TrainingState,
    step: TrainStep,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: WeightAverage | None,
    guard: ZeroGuard,
) -> None:
    """Write the state; a kill at any moment leaves the old one or the new one."""
    progress.zeros = dict(guard.counts)
    atomic_save(
        {
            "version": STATE_VERSION,
            "progress": vars(progress),
            "module": step.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "average": None if average is None else {"state": average.state, "updates": average.updates},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
        run / STATE_FILE,
    )


def load_state(
    run: Path,
    step: TrainStep,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: WeightAverage | None,
    guard: ZeroGuard,
) -> TrainingState:
    """Continue from the state of ``run``, or from the start when it was killed before the first one."""
    if not (run / STATE_FILE).is_file():
        return TrainingState()
    state: Mapping[str, Any] = load_torch(run / STATE_FILE, what="state")
    if state.get("version") != STATE_VERSION:
        raise OptionError(f"'{run / STATE_FILE}' was written by another version of kdcli; start the run again")
    step.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    if average is not None:
        average.load(state["average"]["state"], state["average"]["updates"])
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    progress = TrainingState(**state["progress"])
    guard.counts = dict(progress.zeros)
    return progress
