"""The reference files of DeFeat: foreground masks, the decoupled neck loss with and without adapters, and class KL."""

from __future__ import annotations

import re

import torch
from golden_case import LEVELS, Case, assert_near, images
from torch import Tensor, nn

from kdcli.geometry.defeat_mask import defeat_cells
from kdcli.geometry.grid import Grid
from kdcli.methods.decoupled import adapt, decoupled_imitation
from kdcli.methods.defeat import decoupled_kl
from kdcli.structures import Canvas
from kdcli.tensors import flatten_levels

STRIDES = {"s4": (4, 8, 16, 32, 64), "s8": (8, 16, 32, 64, 128)}
FG_WEIGHT, BG_WEIGHT = 3.0, 12.0  # the released weights, of VOC
CLS_WEIGHT = 2.0


def place_of(inputs: dict[str, Tensor], tag: str) -> tuple[Grid, Canvas]:
    """The grid of the inputs ``s4`` or ``s8``, and their canvas from the size of the finest map."""
    grid = Grid(strides=STRIDES[tag])
    height, width = inputs[f"{tag}_feat_student_l0"].shape[-2:]
    return grid, Canvas(height * grid.strides[0], width * grid.strides[0])


def masks_of(case: Case, tag: str, batch: str) -> Tensor:
    """Foreground cells [B, P] of a batch, by our rule."""
    grid, canvas = place_of(case.file("defeat_neck_inputs"), tag)
    boxes = [case.file("batches")[f"{name}_gt_bboxes"] for name in images(case, batch)]
    return torch.stack([defeat_cells(b, grid, canvas) for b in boxes])


def check_defeat_inputs(case: Case) -> None:
    """Foreground masks of every batch in the file. Its ``roimask`` is FGFI's, not ours; the rest are inputs."""
    found = {(m[1], m[2]) for key in case.arrays if (m := re.fullmatch(r"(s\d)_(\w+)_gtmask_l0", key))}
    assert found
    for tag, batch in sorted(found):
        grid, canvas = place_of(case.arrays, tag)
        shapes = grid.level_shapes(canvas)
        levels = masks_of(case, tag, batch).split([h * w for h, w in shapes], dim=1)
        for k, (ours, shape) in enumerate(zip(levels, shapes, strict=True)):
            golden = case.arrays[f"{tag}_{batch}_gtmask_l{k}"] > 0
            assert torch.equal(ours.reshape(-1, *shape), golden), f"{tag} batch {batch} level {k}"
    known = r"s\d_(\w+_(gt|roi)mask|feat_(student|teacher))_l\d|adapt_(weight|bias)"
    assert all(re.fullmatch(known, key) for key in case.arrays)


def check_defeat_neck(case: Case) -> None:
    """Both neck terms and their gradients, of every batch in the file. Padding counts there: every cell is valid.

    ``fgonly`` is the foreground term alone. ``L1`` is the repository's inverted L1, which we do not offer.
    """
    found = {(m[1], m[2]) for key in case.arrays if (m := re.match(r"(\w+?)_(plain|adapt|fgonly)_losskd_neck$", key))}
    assert found
    checked: set[str] = {key for key in case.arrays if "_L1_" in key}
    for batch, form in sorted(found):
        checked |= check_neck_form(case, batch, form)
    assert set(case.arrays) == checked, f"no check for {sorted(set(case.arrays) - checked)}"


def check_neck_form(case: Case, batch: str, form: str) -> set[str]:
    """One batch with or without adapters; returns the keys that were checked."""
    tag, inputs, name = case.batch, case.file("defeat_neck_inputs"), f"{batch}_{form}"
    grid, canvas = place_of(inputs, tag)
    shapes = grid.level_shapes(canvas)
    maps = [inputs[f"{tag}_feat_student_l{k}"].clone().requires_grad_() for k in range(LEVELS)]
    channels = (maps[0].shape[1],)
    student = flatten_levels(maps, channels)
    teacher = flatten_levels([inputs[f"{tag}_feat_teacher_l{k}"] for k in range(LEVELS)], channels)
    valid = torch.ones(student.shape[:2], dtype=torch.bool)
    adapters = golden_adapters(inputs)
    adapted = adapt(student, adapters, shapes, valid) if form == "adapt" else student
    error, inside = (adapted - teacher).square().mean(dim=-1), masks_of(case, tag, batch)
    parts = [list(x.split([h * w for h, w in shapes], dim=1)) for x in (error, inside, valid)]
    foreground, background = decoupled_imitation(*parts)

    losses = {f"{name}_losskd_neck": FG_WEIGHT * foreground, f"{name}_losskd_neck_back": BG_WEIGHT * background}
    if form == "fgonly":
        del losses[f"{name}_losskd_neck_back"]
    for key, loss in losses.items():
        assert_near(loss.reshape(1), case.arrays[key], key)
    leaves: dict[str, Tensor] = {f"{name}_grad_feat_l{k}": leaf for k, leaf in enumerate(maps)}
    for k, conv in enumerate(adapters):
        leaves |= {f"{name}_grad_adapt_{part}_l{k}": leaf for part, leaf in conv.named_parameters()}
    held = {key: leaf for key, leaf in leaves.items() if key in case.arrays}
    total = torch.stack(list(losses.values())).sum()
    for key, gradient in zip(held, torch.autograd.grad(total, list(held.values())) if held else (), strict=True):
        assert_near(gradient, case.arrays[key], key)
    return losses.keys() | held.keys()


def golden_adapters(inputs: dict[str, Tensor]) -> nn.ModuleList:
    """Convolutions with the file's weights."""
    convs = []
    for weight, bias in zip(inputs["adapt_weight"], inputs["adapt_bias"], strict=True):
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], kernel_size=3, padding=1)
        conv.load_state_dict({"weight": weight, "bias": bias})
        convs.append(conv)
    return nn.ModuleList(convs)


def check_defeat_cls(case: Case) -> None:
    """Decoupled KL with both temperatures, and its parts alone.

    The repository calls the highest label the background: that is the background class where there is one, and without
    negatives (``decouple_nobg``) the highest class, which our own code keeps among the positives.
    """
    g, checked = case.arrays, {"student_logits", "teacher_logits", "labels", "labels_nobg"}
    found = {(m[1], m[2] or "", m[3]) for key in g if (m := re.match(r"([a-z]+)(_nobg)?_T(\d+)_losskd_hcls$", key))}
    assert found
    for form, labels_of, temperature in sorted(found):
        labels, name = g[f"labels{labels_of}"], f"{form}{labels_of}_T{temperature}"
        student = g["student_logits"].clone().requires_grad_()
        background = -1 if form == "all" else int(labels.max())
        positive, negative = (
            CLS_WEIGHT * part
            for part in decoupled_kl(
                student, g["teacher_logits"], labels, background, float(temperature), float(temperature)
            )
        )
        losses = {"losskd_hcls": negative if form == "back" else positive}
        if form == "decouple":
            losses["losskd_hcls_back"] = negative
        for term, loss in losses.items():
            assert_near(loss.reshape(1), g[f"{name}_{term}"], f"{name}_{term}")
            (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
            assert_near(gradient, g[f"{name}_grad_{term}"], f"{name}_grad_{term}")
            checked |= {f"{name}_{term}", f"{name}_grad_{term}"}
    assert set(g) == checked, f"no check for {sorted(set(g) - checked)}"
