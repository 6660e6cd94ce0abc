"""Runs a few steps of several distillations in float64 and prints their loss terms as JSON: alone, or under torchrun."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.engine.loading.epoch_order import plan_epoch
from kdcli.engine.loading.loader import Loader
from kdcli.engine.runtime import distributed
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training.setup import prepare
from kdcli.engine.training.trainer import Trainer
from kdcli.tensors import world_size
from tests.support.small_runs import run_request


def trace(shapes: Path, steps: int, changes: dict[str, Any]) -> list[dict[str, float]]:
    """Every loss term of ``steps`` full global batches, with batch norm frozen."""
    fields = run_request("distill", shapes, **changes)
    made = prepare(fields.options(), frozenset(fields.fields), NullReporter())
    made.student.double()
    for method in made.methods.values():
        method.double()
    joined = made.teacher
    assert joined is not None
    # the teacher itself stays in float32, the same in any number of processes
    exact = replace(joined, forward=lambda batch: {k: double(v) for k, v in joined.forward(batch).items()})
    trainer = Trainer(replace(made, teacher=exact), Path(tempfile.mkdtemp()), NullReporter())
    trainer.step.train()
    for module in trainer.step.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    whole = plan_epoch(
        made.source, made.positions, made.views, seed=made.options.seed, epoch=0, batch=made.options.batch
    )
    full = [k for k, batch in enumerate(whole) if len(batch) == made.options.batch][:steps]
    plan = trainer._plan(0)
    losses = []
    for batch in Loader(made.source, 0).batches([plan[k] for k in full]):
        assert len(batch.keys) * world_size() == made.options.batch
        trainer.state.sums = {}
        trainer._train_batch(batch, len(plan))
        skipped = ("teacher_s", "grad_norm")
        losses.append({k: v for k, v in trainer.state.sums.items() if k not in skipped})
        trainer.state.step += 1
        trainer.state.batch += 1
    return losses


def double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def main() -> None:
    """Arguments: data set, steps, JSON list of cases."""
    torch.set_num_threads(1)
    shapes, steps, cases = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    with distributed.joined("cpu") as first:
        traces = [trace(shapes, steps, case) for case in cases]
        if first:
            print(json.dumps(traces))


if __name__ == "__main__":
    main()
