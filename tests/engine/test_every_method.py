"""Every method on every detector: a lossless store gives what the live teacher gives, bit for bit; the default one nearly.

All methods that work on a detector train together, each with a term of its own in the trace.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.cache.reader import CacheReader
from kdcli.engine.prepare import Prepared, prepare
from kdcli.engine.samples import Loader
from kdcli.engine.step import TrainStep
from kdcli.engine.train import Trainer
from kdcli.engine.watch import Silent
from tests.engine.conftest import asked, cache_options, make_teacher, write

STEPS = 5
DENSE = "ld,rm,pfi,defeat,defeat_thin,bckd,drkd,drkd_lite,cwd,pkd,fgd"
METHODS = {
    "gfl": DENSE,
    "retinanet+distribution": DENSE,
    "atss+distribution": DENSE,
    "fcos+distribution": DENSE,
    # their own box coding, read by the methods whose boxes are derived
    "retinanet": "rm,bckd",
    "atss": "rm,bckd",
    "fcos": "rm,bckd",
    "faster_rcnn": "defeat,defeat_thin,drkd,drkd_lite,cwd,pkd,fgd",
}
# random nets have features so small that a standardised one has a gradient thousands of times the detection loss's
OPTIONS: dict[str, dict[str, Any]] = {
    "pkd": {"weight": 1e-3},
    "cwd": {"weight": 1e-3},
    "defeat": {"backbone_weight": 0.1},
    "ld": {"imitation": "gi", "imitation_weight": 0.2},
}
LOSSY = 1e-3  # of a term, default encodings; 8e-4 was the most seen


def options_of(detector: str) -> dict[str, dict[str, Any]]:
    chosen = {name: dict(values) for name, values in OPTIONS.items() if name in METHODS[detector].split(",")}
    if detector == "faster_rcnn":
        chosen["defeat"] |= {"obj_cls_weight": 2.0, "bg_cls_weight": 2.0}
    return chosen


def prepared(shapes: Path, detector: str, **side: Any) -> Prepared:
    name, _, box = detector.partition("+")
    model = {"name": f"{name}_shufflenet_v2_x0_5", "head_channels": 32, "box": box or "default"}
    fields = asked(
        "distill", shapes, method=METHODS[detector], epochs=4, model=model, methods=options_of(detector), **side
    )
    return prepare(fields.options(), frozenset(fields.fields), Silent())


def trace(run: Prepared, folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Every loss term of the first steps, and the weights after them."""
    trainer = Trainer(run, folder, Silent())
    trainer.step.train()
    losses: list[dict[str, float]] = []
    plan = trainer._plan(0)
    for batch in Loader(run.source, 0).batches(plan[:STEPS]):
        trainer.progress.sums = {}
        trainer._train_batch(batch, len(plan))
        losses.append({k: v for k, v in trainer.progress.sums.items() if k not in ("teacher_s", "grad_norm")})
        trainer.progress.step += 1
        trainer.progress.batch += 1
    return losses, {k: v.clone() for k, v in trainer.step.state_dict().items()}


@pytest.mark.parametrize("detector", METHODS)
def test_a_store_equals_the_live_teacher(detector: str, shapes: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher.pt", detector=detector)
    cache = {"method": METHODS[detector], "methods": options_of(detector)}
    lossless = write(cache_options(shapes, teacher, encoding="lossless", **cache), tmp_path / "lossless")
    default = write(cache_options(shapes, teacher, **cache), tmp_path / "default")
    live = trace(prepared(shapes, detector, teacher=str(teacher)), tmp_path)
    cached = trace(prepared(shapes, detector, cache=str(lossless)), tmp_path)
    names = METHODS[detector].split(",")
    for name in names:
        mine = [term for term in live[0][0] if term.startswith(f"{name}_")]
        assert mine, name
        assert all(any(step[term] != 0 for step in live[0]) for term in mine), name
    assert live[0] == cached[0]
    for name, value in live[1].items():
        assert torch.equal(value, cached[1][name]), name
    # random nets: scores of a head without norm closer together than a step of 8 bits, FCOS boxes without area, whose
    # GIoU jumps
    apart = detector not in ("retinanet", "retinanet+distribution", "fcos")
    nearly = trace(prepared(shapes, detector, cache=str(default)), tmp_path)
    for term, value in live[0][0].items():  # of the same weights: the first step
        if term in ("ld_imitation", "loss") or (term.startswith("bckd") and not apart):
            continue  # of the ten most disputed cells 8 bits may change one: 11 % of the term on these random nets
        assert nearly[0][0][term] == pytest.approx(value, rel=LOSSY, abs=1e-6), term


def test_nothing_is_stored_twice(shapes: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher.pt")
    store = write(cache_options(shapes, teacher, method="pfi,bckd,defeat,drkd,cwd,pkd,fgd"), tmp_path / "store")
    stored = [t.need.key for t in CacheReader(store).schema.tensors]
    assert stored == ["boxes@all", "cls_logits@all", "features@all"]


@pytest.mark.parametrize("detector", METHODS)
def test_a_step_in_bf16(detector: str, shapes: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher.pt", detector=detector)
    run = prepared(shapes, detector, teacher=str(teacher), amp="bf16")
    assert run.amp is torch.bfloat16
    step = TrainStep(run.student, run.methods, run.amp).train()
    assert run.teacher is not None
    batch = next(iter(Loader(run.source, 0).batches([[(0, "identity"), (1, "hflip")]])))
    batch = replace(batch, targets=replace(batch.targets, draws=torch.arange(2)))
    detection, distillation = step(batch, run.teacher.forward(batch))
    for name, term in {**detection, **distillation}.items():
        assert term.dtype == torch.float32, name
        assert torch.isfinite(term), name
    torch.stack([*detection.values(), *distillation.values()]).sum().backward()
    for name, parameter in step.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name  # DDP refuses a parameter that no term uses
            assert torch.isfinite(parameter.grad).all(), name
