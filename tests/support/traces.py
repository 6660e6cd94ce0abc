"""The loss terms and weights of a run's first steps, to compare two ways to make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kdcli.engine.loading.loader import Loader
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training.setup import RunSetup, prepare
from kdcli.engine.training.trainer import Trainer
from tests.support.small_runs import run_request


def run_setup(shapes: Path, method: str, **side: Any) -> RunSetup:
    fields = run_request("distill", shapes, method=method, epochs=4, **side)
    return prepare(fields.options(), frozenset(fields.fields), NullReporter())


def trace(run: RunSetup, folder: Path, steps: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Every loss term of the first ``steps`` steps, and the weights after them."""
    trainer = Trainer(run, folder, NullReporter())
    trainer.step.train()
    losses: list[dict[str, float]] = []
    loader = Loader(run.source, 0)
    for epoch in range(run.options.epochs):
        plan = trainer._plan(epoch)
        for batch in loader.batches(plan):
            if len(losses) == steps:
                return losses, {k: v.clone() for k, v in trainer.step.state_dict().items()}
            trainer.state.sums = {}
            trainer._train_batch(batch, len(plan))
            terms = {k: v for k, v in trainer.state.sums.items() if k not in ("teacher_s", "grad_norm")}
            losses.append(terms)
            trainer.state.step += 1
            trainer.state.batch += 1
    raise AssertionError("too few steps")
