"""What the two benchmarks of costs share: a data set and a teacher, ratios with their limits, and the machine.

Numbers of one machine say little about another, and a busy machine disturbs them. So every figure that matters is a
ratio of two things that were measured in turn, round by round, in one process.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdcli.data.coco import open_split
from kdcli.data.shapes import make_shapes
from kdcli.detectors.build import ModelSpec, build_detector, parse_model_name
from kdcli.detectors.weights import export
from kdcli.engine.caching.plan import StorePlan, plan_store
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training.run_folder import hardware
from kdcli.files import atomic_save, atomic_write_text
from kdcli.options import CacheOptions

DRAWN_VAL = 4  # a run wants a val split, and a store its teacher's AP: neither is measured here


def draw_data(out: Path, images: int) -> str:
    """A drawn data set of ``images`` training images."""
    folder = out / f"shapes-{images}"
    make_shapes(folder, num_train=images, num_val=DRAWN_VAL)
    return str(folder)


def random_teacher(out: Path, data: str, model: str, channels: int, canvas: str) -> str:
    """A checkpoint of ``model`` with random weights for the classes of ``data``: its speed is that of a trained one."""
    detector, backbone = parse_model_name(model)
    classes = open_split(Path(data), "train").classes
    torch.manual_seed(0)
    file = out / f"{model}-{channels}-{len(classes)}.pt"
    spec = ModelSpec(detector, backbone, len(classes), fpn_channels=channels)
    atomic_save(export(build_detector(spec), classes, canvas, {}), file)
    return str(file)


def part_of(data: str, out: Path, images: int, *, val: bool) -> str:
    """A data set of the first ``images`` training images of ``data`` (0: all), and its first few of val if asked.

    The images are linked, not copied. Without a val split a store has no AP of its teacher, which is no part of what
    is measured here.
    """
    folder = out / f"part-{images}{'-val' if val else ''}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", images), ("val", DRAWN_VAL)) if val else (("train", images),):
        dataset = open_split(Path(data), split)
        document = json.loads(dataset.annotations_path.read_text())
        document["images"] = document["images"][: count or None]
        kept = {image["id"] for image in document["images"]}
        document["annotations"] = [a for a in document["annotations"] if a["image_id"] in kept]
        atomic_write_text(folder / "annotations" / f"{split}.json", json.dumps(document))
        (folder / split).symlink_to(dataset.images_dir.resolve())
    return str(folder)


def plan_of(data: str, teacher: str, method: str, canvas: str, workers: int | None) -> StorePlan:
    """What ``cache-teacher`` plans, with default options: two views, fp32, 8 images a forward pass."""
    return plan_store(
        CacheOptions(data=data, teacher=teacher, method=method, canvas=canvas, workers=workers), NullReporter()
    )


def pairwise(
    upper: Sequence[float], lower: Sequence[float], limit: float | None, *, least: bool = False
) -> dict[str, Any]:
    """The ratio of two series that were measured in turn: its median over the rounds, the quartiles, and the verdict."""
    ratios = [a / b for a, b in zip(upper, lower, strict=True)]
    spread = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        **verdict(statistics.median(ratios), limit, least=least),
        "quartiles": [round(spread[0], 3), round(spread[2], 3)],
        "of_medians": round(statistics.median(upper) / statistics.median(lower), 3),
    }


def verdict(value: float, limit: float | None, *, least: bool = False) -> dict[str, Any]:
    """A figure beside its limit, the most that it may be (or, with ``least``, the least)."""
    if limit is None:
        return {"value": round(value, 3)}
    return {"value": round(value, 3), "limit": limit, "met": value >= limit if least else value <= limit}


def machine() -> dict[str, Any]:
    """What the figures depend on beside the settings; ``load`` is that of the last minute, other programs included."""
    return {
        "hardware": hardware(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }
