"""Run folders as the engine writes them, made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Returns ``make(name, ap=..., seed=..., method=[...], ...)``, which writes ``runs/name`` and returns its path."""

    def make(
        name: str,
        *,
        ap: float | None = 40.0,
        seed: int = 0,
        method: list[str] | None = None,
        model: str = "gfl_resnet18",
        epochs: int = 4,
        options: dict[str, Any] | None = None,
        tables: dict[str, dict[str, Any]] | None = None,
        env: dict[str, Any] | None = None,
        metrics: dict[str, Any] | None = None,
        classes: tuple[str, ...] = ("cat", "dog"),
        finished: bool = True,
    ) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        config = {
            "command": "distill" if method else "train",
            "data": "shapes",
            "model": model,
            "canvas": "256x320",
            "epochs": epochs,
            "seed": seed,
            "out": f"runs/{name}",
            **({"method": method} if method else {}),
            **(options or {}),
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in config.items()]
        for table, values in {"optim": {"lr": 0.01}, **(tables or {})}.items():
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        (folder / "config.toml").write_text("\n".join(lines) + "\n")
        machine = {"versions": {"torch": "2.14.1"}, "seed": seed, "argv": ["kdcli"], "data_sha256": "0123456789abcdef"}
        (folder / "env.json").write_text(json.dumps({**machine, **(env or {})}))
        header = ["epoch", "lr", "loss_cls", *(["ld.main", "grad_share_ld"] if method else []), "AP", "AP50"]
        rows = [",".join(header)]
        for epoch in range(1, (epochs if finished else 2) + 1):
            score = "" if epoch % 2 and epoch < epochs else str((ap or 0) * epoch / epochs)
            rows.append(",".join([str(epoch), "0.01", "0.5", *(["0.2", "0.3"] if method else []), score, ""]))
        (folder / "results.csv").write_text("\n".join(rows) + "\n")
        if finished:
            final: dict[str, Any] = {
                "ap": ap,
                "ap50": 60.0,
                "ap75": None,
                "best_ap": (ap or 0) + 1,
                "epochs": epochs,
                "wall_s": 80.0,
            }
            final |= {"peak_memory_bytes": 900_000_000 + seed, "parameters": 1_230_000, "seconds_per_epoch": 20.0}
            final |= {"store_bytes": 19_000_000 if method else None, "per_class": dict.fromkeys(classes, ap)}
            (folder / "metrics.json").write_text(json.dumps({**final, **(metrics or {})}))
        return folder

    return make
