"""Reading the reference files: cases, their batches and inputs, and comparisons with their tolerances."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdcli.geometry.assign import AssignerSpec, assign
from kdcli.geometry.grid import Grid
from kdcli.structures import IGNORED, Canvas, Targets
from kdcli.tensors import flatten_levels

TOLERANCE = 1e-5  # of a loss, and of the largest gradient
LOW_SCORE = -7.0
LEVELS = 5
HYPER = re.compile(r"(?:^|_)(?:T|weight)$")  # names of hyper-parameters, which are scalars, e.g. "loss_ld_T"

ANCHOR_GRID = Grid()
RETINA_GRID = Grid(base_scale=4.0, scales=(1.0, 2 ** (1 / 3), 2 ** (2 / 3)), ratios=(0.5, 1.0, 2.0))
ATSS = AssignerSpec("atss", topk=9)
MAX_IOU = AssignerSpec("max_iou", pos_iou=0.5, neg_iou=0.4, min_pos_iou=0.0)


class Arrays(dict[str, Tensor]):
    """The arrays of a file, which remember the keys that were looked at, and those that something of ours was held against: a
    check must look at all of them, and compare at least one."""

    def __init__(self, arrays: dict[str, Tensor]) -> None:
        super().__init__(arrays)
        self.seen: set[str] = set()
        self.compared: set[str] = set()

    def golden(self, key: str) -> Tensor:
        """The array ``key``, which the caller compares with ours."""
        self.compared.add(key)
        return self[key]

    def __getitem__(self, key: str) -> Tensor:
        self.seen.add(key)
        return super().__getitem__(key)

    def matching(self, pattern: str) -> dict[str, re.Match[str]]:
        """Keys that match as a whole, with their match; not yet looked at."""
        return {key: found for key in self if (found := re.fullmatch(pattern, key))}

    def leave_out(self, pattern: str) -> None:
        """Take keys for seen that kdcli has no counterpart of; the caller says why."""
        self.seen |= self.matching(pattern).keys()

    def unseen(self) -> list[str]:
        """What no check has looked at."""
        return sorted(self.keys() - self.seen)


@dataclass(frozen=True)
class Case:
    """One reference file. ``rest``: what its name says after the kind, e.g. "A" or "B_finegrained"; its parts may say the
    batch, the imitation or the strides, in any order, and anything else. ``choice``: what they do not say, tried in turn.
    """

    folder: Path
    name: str
    rest: str
    arrays: Arrays
    choice: Mapping[str, str] = field(default_factory=dict)

    def chosen(self, what: str, known: Sequence[str]) -> str | None:
        """The first of ``known`` that the name says, else the one to try for ``what``; None where there is neither."""
        said = [part for part in self.rest.split("_") if part in known]
        return said[0] if said else self.choice.get(what)

    @property
    def batches(self) -> list[str]:
        """The batches of the folder: ``["A", "B", "R", "Z"]``."""
        found = (re.fullmatch(r"(\w+)_img\d+_gt_bboxes", key) for key in self.file("batches"))
        return sorted({match[1] for match in found if match})

    @property
    def batch(self) -> str:
        """The batch that the file is of."""
        batch = self.chosen("batch", self.batches)
        assert batch is not None, f"{self.name}: its name has no batch of {', '.join(self.batches)}"
        return batch

    def need(self, key: str, what: str) -> Tensor:
        """An input of the file itself, without which ``what`` cannot be computed."""
        assert key in self.arrays, f"{self.name}.npz: {key} is missing, which {what} is computed from"
        return self.arrays[key]

    def file(self, name: str) -> dict[str, Tensor]:
        """Another file of the same folder, e.g. "batches"."""
        path = self.folder / f"{name}.npz"
        assert path.is_file(), f"{self.name}.npz: {path.name} is missing beside it"
        return load(path)

    def setting(self, default: float, *names: str) -> float:
        """A hyper-parameter: the first of ``names`` that the file has, else the published ``default``."""
        return next((float(self.arrays[name].reshape(())) for name in names if name in self.arrays), default)

    def cls_shift(self) -> float:
        """What is added to the student's class logits of the inputs."""
        return self.setting(LOW_SCORE if self.name.endswith("_lowscore") else 0.0, "cls_shift")

    def teacher_shift(self, error: Callable[[float], float]) -> float:
        """What is added to the teacher's class logits: what the file says, else 0 or the student's shift.

        A file of lowered scores need not say whether the teacher's were lowered too. What it holds does: ``error`` is
        how far ours is from that, for a shift of the teacher.
        """
        shift = self.cls_shift()
        if "teacher_cls_shift" in self.arrays or not shift:
            return self.setting(0.0, "teacher_cls_shift")
        return min((0.0, shift), key=error)


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


def compare(case: Case, key: str, ours: Tensor, scale: float | None = None) -> bool:
    """``assert_near`` with the array ``key`` of the file; False where it has none."""
    if key not in case.arrays:
        return False
    assert_near(ours, case.arrays.golden(key), f"{case.name} {key}", scale)
    return True


def at_valid(ours: Tensor, golden: Tensor, valid: Tensor, marker: float) -> Tensor:
    """``ours`` [N, ...] with what ``golden`` has at the anchors that are not ``valid`` [N]: the file's ``marker`` for them, or
    the 0 that official code fills them with, and nothing else."""
    outside = golden[~valid]
    assert bool(((outside == marker) | (outside == 0)).all()), f"anchors outside the valid area are not {marker} or 0"
    result = ours.clone().to(golden.dtype)
    result[~valid] = outside
    return result


def assert_near(ours: Tensor, golden: Tensor, what: str, scale: float | None = None) -> None:
    """Equal within 1e-5 of the largest value of ``golden`` (or of ``scale``)."""
    assert ours.shape == golden.shape, f"{what}: {tuple(ours.shape)} against {tuple(golden.shape)}"
    if golden.numel() == 0:
        return
    largest = float(golden.abs().max()) if scale is None else max(scale, float(golden.abs().max()))
    error = float((ours.detach().double() - golden.double()).abs().max())
    assert error <= TOLERANCE * largest, f"{what}: off by {error:.3g}, largest value {largest:.3g}"


def number(text: str) -> float:
    """A number as keys spell it: ``1p5`` is 1.5."""
    return float(text.replace("p", "."))


def on_level(targets: Targets, sizes: list[int], level: int) -> Targets:
    """The same with everything ignored that lies on another level."""
    start = sum(sizes[:level])
    assigned = torch.full_like(targets.assigned, IGNORED)
    part = slice(start, start + sizes[level])
    assigned[:, part] = targets.assigned[:, part]
    return replace(targets, assigned=assigned)


def by_level(
    loss: Callable[[Targets], dict[str, Tensor]], norms: Callable[[Targets], dict[str, float]],
    targets: Targets, sizes: list[int],
) -> dict[str, Tensor]:  # fmt: skip
    """Each loss by level, [L]: ``loss`` of one level's targets, divided by what the whole batch is divided by.

    ``norms``: what each loss is divided by.
    """
    found: dict[str, list[Tensor]] = {}
    whole = norms(targets)
    for level in range(len(sizes)):
        part = on_level(targets, sizes, level)
        own = norms(part)
        for name, value in loss(part).items():
            found.setdefault(name, []).append(value.detach() * own[name] / whole[name])
    return {name: torch.stack(values) for name, values in found.items()}


def check_losses(
    case: Case, losses: dict[str, Tensor], inputs: dict[str, list[Tensor]], levels: dict[str, Tensor]
) -> None:
    """Every loss that the file has, its part of every level, and its gradients.

    ``levels``: by loss [L], for files that hold losses by level; FCOS's losses are one number. A loss of the file that is
    none of ours fails by name.
    """
    held = {key for key in case.arrays if key.startswith("loss_") and not HYPER.search(key)}
    unknown = sorted(held - losses.keys())
    assert not unknown, f"{case.name}.npz: no check for {', '.join(unknown)}; its kind has {', '.join(sorted(losses))}"
    for name, loss in losses.items():
        if name in held:
            golden = case.arrays.golden(name)
            assert_loss(loss, golden.double().sum(), name)
            if golden.numel() > 1:
                assert name in levels, f"{name}: the file has it by level, ours is one number"
                assert_loss(levels[name], golden, f"{name} by level")
        check_gradients(case, name, loss, inputs)


def check_gradients(case: Case, name: str, loss: Tensor, inputs: dict[str, list[Tensor]]) -> None:
    """The gradient of one loss to every input on every level.

    The references leave out a gradient that is zero. So where a file has some of a loss's, or a loss that is 0 beside
    gradients of others, one that is not there must be zero; where it has none at all of a loss, it says nothing of them.
    """
    some = any(key.startswith("d_") for key in case.arrays)
    nothing = name in case.arrays and not bool(case.arrays[name].any())
    if not any(key.startswith(f"d_{name}__d_") for key in case.arrays) and not (some and nothing):
        return
    flat_inputs = [leaf for maps in inputs.values() for leaf in maps]
    found = torch.autograd.grad(loss, flat_inputs, retain_graph=True, allow_unused=True)
    gradients = iter(torch.zeros_like(x) if g is None else g for x, g in zip(flat_inputs, found, strict=True))
    for key, maps in inputs.items():
        for level in range(len(maps)):
            check_gradient(case.arrays, f"d_{name}__d_{key}_l{level}", next(gradients))


def assert_loss(ours: Tensor, golden: Tensor, what: str) -> None:
    """Equal within 1e-5 of each value; a part below 1 % of the largest one within 1e-5 of that 1 %."""
    assert ours.shape == golden.shape, f"{what}: {tuple(ours.shape)} against {tuple(golden.shape)}"
    mine, theirs = ours.detach().double(), golden.double()
    scale = theirs.abs().clamp(min=float(theirs.abs().max()) / 100)
    assert bool(((mine - theirs).abs() <= TOLERANCE * scale).all()), (
        f"{what}: {mine.tolist()} against {theirs.tolist()}"
    )


def check_gradient(arrays: Arrays, key: str, ours: Tensor) -> None:
    """Compare with the full gradient, or with the reduced forms that the file holds of it."""
    views: dict[str, Callable[[], Tensor]] = {
        key: lambda: ours,
        f"{key}__sum_c": lambda: ours.sum(dim=1),
        f"{key}__sum_hw": lambda: ours.sum(dim=(2, 3)),
        f"{key}__val": lambda: ours.reshape(-1)[arrays[f"{key}__idx"].long()],
    }
    held = [name for name in views if name in arrays]
    if f"{key}__val" in held:
        assert f"{key}__idx" in arrays, f"{key}__val without {key}__idx, the places of its values"
    if not held:
        assert not ours.any(), f"{key}: absent in the file, so it must be zero"
    for name in held:
        assert_near(views[name](), arrays.golden(name), name, scale=float(ours.abs().max()))
