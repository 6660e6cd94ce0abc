"""What mmdet 3.3.0 computed with weights that are drawn again from their names: see ``mmdet_cases/README.md``."""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcli.structures import Canvas

CASES = Path(__file__).parents[1] / "detectors" / "mmdet_cases"


@cache
def case(name: str) -> dict[str, NDArray[Any]]:
    with np.load(CASES / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


@cache
def weights(name: str) -> dict[str, Tensor]:
    """mmdet's state dict; ``RandomState`` draws the same numbers with every numpy. Shared: not to be modified."""
    arrays = case(name)
    gain = json.loads(str(arrays["gain"]))
    shapes = json.loads(str(arrays["names"]))
    return {key: _draw(key, tuple(shape), gain) for key, shape in shapes.items()}


def _draw(key: str, shape: tuple[int, ...], gain: dict[str, Any]) -> Tensor:
    draw = np.random.RandomState(zlib.crc32(key.encode()))
    last = key.rpartition(".")[2]
    value: Any
    if last in ("num_batches_tracked", "project"):
        return torch.zeros(shape, dtype=torch.int64)
    if last in ("scale", "running_var"):
        value = draw.uniform(0.5, 1.5, shape)
    elif last == "weight" and len(shape) == 1:
        ends = "bn3" if gain["bottlenecks"] else "bn2"  # weak residual branches keep rounding errors small
        branch = key.startswith("backbone.layer") and key.split(".")[3] == ends
        value = draw.uniform(0.1, 0.3, shape) if branch else draw.uniform(0.5, 1.5, shape)
    elif last == "weight":
        value = draw.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:])) * gain["of"].get(key, 1.0)
    else:
        value = draw.standard_normal(shape) * 0.1 + gain["of"].get(key, 0.0)
    return torch.from_numpy(np.asarray(value)).float()


def config_text(name: str) -> str:
    """What such a model's config says, broken into lines as mmdet writes it."""
    arrays = case(name)
    facts = json.loads(str(arrays["facts"]))
    mean, std = (",\n    ".join(str(v) for v in arrays[key]) for key in ("mean", "std"))
    flags = "norm_on_bbox=True, centerness_on_reg=True, " if facts["norm_on_bbox"] else ""
    return (
        f"model = dict({flags}backbone=dict(style='{facts['style']}'), coder=dict(target_means=[\n 0.0, 0.0]),\n"
        f"  data_preprocessor=dict(bgr_to_rgb={facts['to_rgb']}, mean=[\n    {mean},\n  ], std=[\n    {std},\n  ]))"
    )


def canvas_of(name: str) -> Canvas:
    stride = 4 if name == "faster_rcnn" else 8
    return Canvas(*(side * stride for side in case(name)["cls_l0"].shape[2:]))


def images_of(name: str) -> Tensor:
    """RGB in 0..1."""
    shape = (len(case(name)["cls_l0"]), 3, *canvas_of(name).size)
    return torch.from_numpy(np.random.RandomState(7).randint(0, 256, shape).astype(np.uint8)).float() / 255
