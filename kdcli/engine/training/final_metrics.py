"""What ``metrics.json`` says of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcli.digest import sealed
from kdcli.engine.teacher.approximations import approximations
from kdcli.engine.teacher.binding import BoundTeacher
from kdcli.engine.training.checkpoint import TrainingState
from kdcli.engine.training.run_files import history_digest


def final_metrics(
    state: TrainingState, evaluation: Mapping[str, Any], teacher: BoundTeacher | None, precision: str,
    weights_sha256: Mapping[str, str], identity: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Scores of the last epoch, costs, what was approximated, and digests: of the weights, of results.csv, of itself.

    ``precision``: of a live teacher. ``identity``: the digest of the run's env.json.
    """
    seconds = [row["epoch_s"] for row in state.history]
    return sealed(
        {
            **{k: v for k, v in evaluation.items() if k != "evaluation_s"},
            "best_ap": state.best_ap,
            "best_epoch": state.best_epoch,
            "epochs": state.epoch,
            "wall_s": state.wall_s,
            "seconds_per_epoch": sum(seconds) / len(seconds),
            "peak_memory_bytes": state.peak_memory_bytes,
            "train_images_per_s": state.history[-1]["images_per_s"],
            "data_wait_percent": state.history[-1]["data_wait_percent"],
            "store_bytes": None if teacher is None else teacher.store_bytes,
            "teacher_ap": None if teacher is None else teacher.ap,
            "approximations": [] if teacher is None else approximations(teacher, precision),
            "weights_sha256": dict(weights_sha256),
            "run": identity,
            "results": history_digest(state.history),
        }
    )
