"""Reading the reference files: cases, their batches and inputs, and comparisons with their tolerances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdcli.geometry.assign import AssignerSpec, assign
from kdcli.geometry.grid import Grid
from kdcli.structures import Canvas, Targets
from kdcli.tensors import flatten_levels

TOLERANCE = 1e-5  # of a loss, and of the largest gradient
LOW_SCORE = -7.0
LEVELS = 5

ANCHOR_GRID = Grid()
RETINA_GRID = Grid(base_scale=4.0, scales=(1.0, 2 ** (1 / 3), 2 ** (2 / 3)), ratios=(0.5, 1.0, 2.0))
ATSS = AssignerSpec("atss", topk=9)
MAX_IOU = AssignerSpec("max_iou", pos_iou=0.5, neg_iou=0.4, min_pos_iou=0.0)


@dataclass(frozen=True)
class Case:
    """One reference file; ``batch`` is what its name says after the kind, e.g. "A"."""

    folder: Path
    name: str
    batch: str
    arrays: dict[str, Tensor]

    def file(self, name: str) -> dict[str, Tensor]:
        """Another file of the same folder, e.g. "batches"."""
        return load(self.folder / f"{name}.npz")

    def cls_shift(self) -> float:
        """What is added to the class logits of the inputs."""
        if "cls_shift" in self.arrays:
            return float(self.arrays["cls_shift"])
        return LOW_SCORE if self.name.endswith("_lowscore") else 0.0


@lru_cache(maxsize=32)
def load(path: Path) -> dict[str, Tensor]:
    """All arrays of a file. Shared: not to be modified."""
    with np.load(path, allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def images(case: Case, batch: str) -> list[str]:
    """``["A_img0", "A_img1"]``."""
    keys = case.file("batches")
    names = sorted({k.rsplit("_gt_bboxes", 1)[0] for k in keys if k.startswith(f"{batch}_img") and "gt_bboxes" in k})
    assert names, f"{case.name}: batch {batch} is not in batches.npz"
    return names


def content_of(case: Case, image: str) -> tuple[int, int]:
    """(height, width) of an image's content; its padding must be what our grid assumes, the next multiple of 32."""
    batches = case.file("batches")
    height, width = (int(v) for v in batches[f"{image}_img_shape"])
    assert [-(-height // 32) * 32, -(-width // 32) * 32] == batches[f"{image}_pad_shape"].tolist()
    return height, width


def canvas_of(levels: dict[str, Tensor], name: str = "bbox") -> Canvas:
    """The canvas that inputs were made for, from the size of their finest map."""
    height, width = levels[f"{name}_l0"].shape[-2:]
    return Canvas(height * ANCHOR_GRID.strides[0], width * ANCHOR_GRID.strides[0])


def make_targets(case: Case, batch: str, canvas: Canvas, grid: Grid, spec: AssignerSpec) -> Targets:
    """The batch as kdcli sees it, assigned by kdcli."""
    batches, names = case.file("batches"), images(case, batch)
    boxes = [batches[f"{n}_gt_bboxes"] for n in names]
    contents = [content_of(case, n) for n in names]
    return Targets(
        boxes=boxes,
        labels=[batches[f"{n}_gt_labels"].long() for n in names],
        content=torch.tensor(contents),
        canvas=canvas,
        assigned=torch.stack([assign(spec, grid, canvas, b, c) for b, c in zip(boxes, contents, strict=True)]),
        valid=torch.stack([grid.valid(canvas, c) for c in contents]),
    )


def leaves(inputs: dict[str, Tensor], name: str, shift: float = 0.0) -> list[Tensor]:
    """The maps of one input, one leaf tensor a level, fresh."""
    return [(inputs[f"{name}_l{k}"] + shift).requires_grad_() for k in range(LEVELS)]


def flat(maps: list[Tensor], trailing: tuple[int, ...]) -> Tensor:
    """Levels joined: [B, N, *trailing]."""
    return flatten_levels(maps, trailing)


def assert_near(ours: Tensor, golden: Tensor, what: str, scale: float | None = None) -> None:
    """Equal within 1e-5 of the largest value of ``golden`` (or of ``scale``)."""
    assert ours.shape == golden.shape, f"{what}: {tuple(ours.shape)} against {tuple(golden.shape)}"
    if golden.numel() == 0:
        return
    largest = float(golden.abs().max()) if scale is None else max(scale, float(golden.abs().max()))
    error = float((ours.detach().double() - golden.double()).abs().max())
    assert error <= TOLERANCE * largest, f"{what}: off by {error:.3g}, largest value {largest:.3g}"


def check_losses(case: Case, losses: dict[str, Tensor], inputs: dict[str, list[Tensor]]) -> None:
    """Every loss summed over levels, and its gradient to every input on every level, zero where the file has none."""
    names = {key for key in case.arrays if key.startswith("loss_")}
    assert names == set(losses)
    for name, loss in losses.items():
        ours, golden = float(loss.detach()), float(case.arrays[name].double().sum())
        assert abs(ours - golden) <= TOLERANCE * abs(golden), f"{name}: {ours} against {golden}"
        flat_inputs = [leaf for maps in inputs.values() for leaf in maps]
        found = torch.autograd.grad(loss, flat_inputs, retain_graph=True, allow_unused=True)
        gradients = iter(torch.zeros_like(x) if g is None else g for x, g in zip(flat_inputs, found, strict=True))
        for key, maps in inputs.items():
            for level in range(len(maps)):
                check_gradient(case.arrays, f"d_{name}__d_{key}_l{level}", next(gradients))


def check_gradient(arrays: dict[str, Tensor], key: str, ours: Tensor) -> None:
    """Compare with the full gradient, or with the reduced forms that the file holds of it."""
    views: dict[str, Callable[[], Tensor]] = {
        key: lambda: ours,
        f"{key}__sum_c": lambda: ours.sum(dim=1),
        f"{key}__sum_hw": lambda: ours.sum(dim=(2, 3)),
        f"{key}__val": lambda: ours.reshape(-1)[arrays[f"{key}__idx"].long()],
    }
    held = [name for name in views if name in arrays]
    if not held:
        assert not ours.any(), f"{key}: absent in the file, so it must be zero"
    for name in held:
        assert_near(views[name](), arrays[name], name, scale=float(ours.abs().max()))
