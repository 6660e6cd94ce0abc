"""A drawn data set and a teacher, made once for all tests of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.classes import ClassList
from kdcli.data.shapes import make_shapes
from kdcli.detectors.build import ModelSpec, build_detector
from kdcli.detectors.weights import export
from kdcli.engine.caching.plan import plan_store
from kdcli.engine.caching.write import write_store
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training import run_config
from kdcli.files import atomic_save
from kdcli.methods.resolve import name_methods
from kdcli.options import CacheOptions, build, layer

CANVAS = "96x128"
STUDENT = {"name": "gfl_shufflenet_v2_x0_5", "fpn_channels": 32, "tower_convs": 1}
CLASSES = ("circle", "square", "triangle", "star", "cross", "ring", "hexagon", "arrow")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 6 validation images."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes(root, num_train=24, num_val=6, seed=3, size=(96, 160))
    return root


def make_teacher(path: Path, *, detector: str = "gfl", seed: int = 11, scale: float = 25.0) -> Path:
    """A checkpoint with random weights whose last layers are enlarged, so that its outputs differ between cells.

    ``detector``: e.g. ``fcos``, or ``fcos+distribution`` for LD's box branch.
    """
    torch.manual_seed(seed)
    name, _, box = detector.partition("+")
    table: dict[str, Any] = {"fpn_channels": 64, "tower_convs": 1, "head_channels": 64, "box": box or "default"}
    model = build_detector(ModelSpec(name, "mobilenet_v3_small", len(CLASSES), **table))
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if part.startswith("head") and parameter.ndim > 1:
                parameter.mul_(scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_save(export(model, ClassList.numbered(CLASSES), CANVAS, {}), path)
    return path


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GFL teacher's checkpoint."""
    return make_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pt")


def cache_options(shapes: Path, teacher: Path, **changes: Any) -> CacheOptions:
    """Options of a store of all methods, with shards small enough that there are several."""
    fields = {
        "data": str(shapes), "teacher": str(teacher), "method": "ld,rm,pfi", "workers": 0, "shard_rows": 10,
        "micro_batch": 4, "threads": 1,
    }  # fmt: skip
    return build(CacheOptions, {**fields, **changes})


def write(options: CacheOptions, out: Path) -> Path:
    """Write a whole store."""
    write_store(plan_store(options, NullReporter()), out, NullReporter())
    return out


@pytest.fixture(scope="session")
def lossless_store(shapes: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything as float32."""
    return write(cache_options(shapes, teacher, encoding="lossless"), tmp_path_factory.mktemp("stores") / "lossless")


@pytest.fixture(scope="session")
def default_store(shapes: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default encodings."""
    return write(cache_options(shapes, teacher), tmp_path_factory.mktemp("stores") / "default")


def run_request(command: str, shapes: Path, **changes: Any) -> run_config.RunRequest:
    """Fields of a small run."""
    fields = {
        "data": str(shapes), "canvas": CANVAS, "epochs": 2, "batch": 4, "workers": 0, "threads": 1, "model": STUDENT,
        "optim": {"lr": 0.02}, "micro_batch": 4,
    }  # fmt: skip
    name_methods(str(changes.get("method", "")))
    return run_config.from_flags(command, layer(fields, changes), {}, None, {})
