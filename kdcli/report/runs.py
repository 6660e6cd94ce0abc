"""Run folders as values: what was asked for, on what machine, how it went and how it ended.

A run folder holds ``config.toml``, ``env.json``, ``results.csv`` and, once finished, ``metrics.json``. A run without
final metrics, or with a file that cannot be read, keeps the reason in ``problem`` and does not fail its neighbours.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kdcli.digest import DIGEST
from kdcli.engine.training import run_files
from kdcli.errors import MissingPathError, OptionError, pluralize

T = TypeVar("T")

# What differs between two runs without being a setting of the experiment: the seed, places, and how the work is spread
# over the machine (which moves no draw and sums in another order at most), and what stops it. The data set has its own check,
# with how it was read: what --clip-boxes and --exif changed is in its hash.
_NOT_SETTINGS = frozenset(
    {"seed", "out", "data", "clip_boxes", "exif", "workers", "threads", "save_steps", "gradient_limit"}
)
_NOT_LOSSES = frozenset(
    {
        *("epoch", "lr", "AP", "AP50", "AP75", "grad_norm", "images_per_s"),
        *("data_wait_percent", "teacher_percent", "epoch_s", "peak_memory_bytes"),
    }
)


@dataclass(frozen=True)
class Run:
    """One run folder, read. ``history`` has one dict of numbers for each epoch; cells left empty are absent."""

    path: Path
    config: Mapping[str, Any]
    env: Mapping[str, Any]
    metrics: Mapping[str, Any]  # empty when ``problem`` is set
    history: tuple[Mapping[str, float], ...]
    problem: str | None

    @property
    def command(self) -> str:
        """``train`` or ``distill``."""
        return str(self.config.get("command", "train"))

    @property
    def seed(self) -> int:
        """The seed of the run (0 when the configuration names none)."""
        return int(self.config.get("seed", 0))

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the distillation methods, none for plain training."""
        method = self.config.get("method") or ()
        names = method.split(",") if isinstance(method, str) else method
        return tuple(str(name).strip() for name in names)

    @property
    def model(self) -> str:
        """``<detector>_<backbone>``."""
        model = self.config.get("model", "")
        return str(model.get("name", "")) if isinstance(model, Mapping) else str(model)

    @property
    def epochs(self) -> int | None:
        """Epochs asked for."""
        epochs = self.config.get("epochs", self.metrics.get("epochs"))
        return None if epochs is None else int(epochs)

    @property
    def approximations(self) -> tuple[str, ...]:
        """What the run approximates, in words; runs from before this was noted name nothing."""
        return tuple(str(name) for name in self.metrics.get("approximations", ()))

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration under dotted keys, without seed, places and the spread over the machine."""
        return {key: value for key, value in flatten(self.config).items() if key not in _NOT_SETTINGS}

    def value(self, key: str) -> float | None:
        """A number of the final metrics, None when absent or null."""
        found = self.metrics.get(key)
        return None if found is None else float(found)

    def curve(self, column: str) -> list[tuple[int, float]]:
        """(epoch, value) of a column of ``results.csv``, where it has a value."""
        return [(int(row["epoch"]), row[column]) for row in self.history if column in row]

    def loss_columns(self) -> list[str]:
        """Columns of ``results.csv`` that hold loss terms, in file order."""
        columns = dict.fromkeys(column for row in self.history for column in row)
        return [c for c in columns if c not in _NOT_LOSSES and not c.startswith("grad_share_")]


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read every run folder among ``paths`` and below them, each once, in the order given and then by name.

    Raises MissingPathError for a path that is not there, or below which there is no run folder.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise MissingPathError(f"no run folder at '{path}': give a run folder or a folder of runs")
        found = list(_run_folders(path))
        if not found:
            raise MissingPathError(f"no run below '{path}': a run folder holds config.toml")
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    return [load_run(folder) for folder in folders.values()]


def load_run(folder: Path) -> Run:
    """Read one run folder; whatever is missing or broken in it becomes ``problem``."""
    problems: list[str] = []

    def read(reader: Callable[[Path], T], otherwise: T) -> T:
        try:
            return reader(folder)
        except (OptionError, MissingPathError) as error:
            problems.append(str(error))
            return otherwise

    nothing: dict[str, Any] = {}
    config = read(run_files.read_settings, nothing)
    env = read(run_files.read_environment, nothing) if (folder / "env.json").exists() else nothing
    if env and not problems:
        read(lambda _: run_files.require_bound(config, env), None)
    no_rows: tuple[dict[str, float], ...] = ()
    history = read(run_files.read_history, no_rows)
    metrics: Mapping[str, Any] = {}
    if not (folder / "metrics.json").exists():
        of = f" of {config['epochs']}" if "epochs" in config else ""
        done = f"{len(history)}{of} epochs" if of else pluralize(len(history), "epoch")
        problems.append(f"unfinished: no metrics.json after {done}")
    else:
        metrics = read(run_files.read_metrics, {})
        if metrics and metrics["ap"] is None:
            problems.append("metrics.json has no AP: the evaluated split has no ground truth")
        if metrics.get("run") not in (None, env.get(DIGEST)):
            problems.append("metrics.json and env.json are not of one run")
        if metrics.get("results", run_files.history_digest(history)) != run_files.history_digest(history):
            problems.append("results.csv is not what metrics.json has the digest of")
    return Run(
        path=folder,
        config=config,
        env=env,
        metrics={} if problems else metrics,
        history=history,
        problem="; ".join(problems) or None,
    )


def mean_curve(runs: Sequence[Run], column: str = "AP") -> list[tuple[int, float, float, float]]:
    """(epoch, mean, lowest, highest) of a results column over ``runs``, at epochs where any has a finite value."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for epoch, value in run.curve(column):
            if math.isfinite(value):
                values.setdefault(epoch, []).append(value)
    return [(epoch, math.fsum(v) / len(v), min(v), max(v)) for epoch, v in sorted(values.items())]


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables under dotted keys: ``{"ld": {"temperature": 10}}`` -> ``{"ld.temperature": 10}``."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _run_folders(root: Path) -> Iterator[Path]:
    """Folders with a config.toml at or below ``root``; stores and the inside of runs are not searched."""
    for folder, children, files in os.walk(root):
        if "config.toml" in files:
            yield Path(folder)
            children.clear()
        elif "zarr.json" in files:
            children.clear()
        children.sort()
