"""The reference files of DeFeat: foreground masks, the decoupled neck loss with and without adapters, and class KL."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdcli.geometry.defeat_mask import defeat_cells
from kdcli.geometry.grid import Grid
from kdcli.methods.decoupled import adapt, decoupled_imitation
from kdcli.methods.defeat import decoupled_kl
from kdcli.structures import Canvas
from kdcli.tensors import flatten_levels
from tests.support.golden.case import LEVELS, Case, compare, images, number

STRIDES = {"s4": (4, 8, 16, 32, 64), "s8": (8, 16, 32, 64, 128)}
FG_WEIGHT, BG_WEIGHT = 3.0, 12.0  # the released weights, of VOC
CLS_WEIGHT = 2.0


def open_storage(inputs: dict[str, Tensor], tag: str) -> tuple[Grid, Canvas]:
    """The grid of the inputs ``s4`` or ``s8``, and their canvas from the size of the finest map."""
    grid = Grid(strides=STRIDES[tag])
    height, width = inputs[f"{tag}_feat_student_l0"].shape[-2:]
    return grid, Canvas(height * grid.strides[0], width * grid.strides[0])


def masks_of(case: Case, tag: str, batch: str) -> Tensor:
    """Foreground cells [B, P] of a batch, by our rule."""
    grid, canvas = open_storage(case.file("defeat_neck_inputs"), tag)
    boxes = [case.file("batches")[f"{name}_gt_bboxes"] for name in images(case, batch)]
    return torch.stack([defeat_cells(b, grid, canvas) for b in boxes])


def check_defeat_inputs(case: Case) -> None:
    """Foreground masks of every batch in the file; the rest are inputs."""
    found = {(m[1], m[2]) for m in case.arrays.matching(r"(s[48])_(\w+)_gtmask_l\d").values()}
    for tag, batch in sorted(found):
        case.need(f"{tag}_feat_student_l0", f"the size of {tag}")
        grid, canvas = open_storage(case.arrays, tag)
        shapes = grid.level_shapes(canvas)
        levels = masks_of(case, tag, batch).split([h * w for h, w in shapes], dim=1)
        for k, (ours, shape) in enumerate(zip(levels, shapes, strict=True)):
            key = f"{tag}_{batch}_gtmask_l{k}"
            if key in case.arrays:
                golden = case.arrays.golden(key) > 0
                assert torch.equal(ours.reshape(-1, *shape), golden), f"{tag} batch {batch} level {k}"
    case.arrays.leave_out(r"s\d_\w+_roimask_l\d")  # FGFI's mask, of RPN anchors that the file does not name
    case.arrays.leave_out(r"s\d_feat_(student|teacher)_l\d|adapt_(weight|bias)")  # inputs of defeat_neck


def check_defeat_neck(case: Case) -> None:
    """Both neck terms and their gradients, of every batch in the file. Padding counts there: every cell is valid.

    ``fgonly`` is the foreground term alone; ``L1`` too, of the repository's L1 option.
    """
    names = case.arrays.matching(r"(\w+?)_(plain|adapt|fgonly|L1)_(?:losskd_neck(?:_back)?|grad_\w+)")
    found = {(match[1], match[2]) for match in names.values()}
    for batch, form in sorted(found):
        check_neck_form(case, batch, form)


def squared_or_l1(difference: Tensor, form: str) -> Tensor:
    """What an element costs: its square, or the L1 option of the repository, linear below 1 and square above.

    kdcli has no such option, since it is a smooth L1 with its branches exchanged; masks, counts and weights are checked.
    """
    size = difference.abs()
    return torch.where(size < 1, size, size.square()) if form == "L1" else size.square()


def check_neck_form(case: Case, batch: str, form: str) -> None:
    """One batch with or without adapters."""
    inputs, name = case.file("defeat_neck_inputs"), f"{batch}_{form}"
    tag = case.chosen("strides", tuple(STRIDES))
    assert tag is not None, f"{case.name}: its name says neither of {', '.join(STRIDES)}, whose strides it is of"
    grid, canvas = open_storage(inputs, tag)
    shapes = grid.level_shapes(canvas)
    maps = [inputs[f"{tag}_feat_student_l{k}"].clone().requires_grad_() for k in range(LEVELS)]
    channels = (maps[0].shape[1],)
    student = flatten_levels(maps, channels)
    teacher = flatten_levels([inputs[f"{tag}_feat_teacher_l{k}"] for k in range(LEVELS)], channels)
    valid = torch.ones(student.shape[:2], dtype=torch.bool)
    adapters = golden_adapters(inputs)
    adapted = adapt(student, adapters, shapes, valid) if form == "adapt" else student
    error, inside = squared_or_l1(adapted - teacher, form).mean(dim=-1), masks_of(case, tag, batch)
    parts = [list(x.split([h * w for h, w in shapes], dim=1)) for x in (error, inside, valid)]
    foreground, background = decoupled_imitation(*parts)

    losses = {f"{name}_losskd_neck": case.setting(FG_WEIGHT, "losskd_neck_weight") * foreground}
    if form not in ("fgonly", "L1"):
        losses[f"{name}_losskd_neck_back"] = case.setting(BG_WEIGHT, "losskd_neck_back_weight") * background
    for key, loss in losses.items():
        compare(case, key, loss.reshape(1))
    leaves: dict[str, Tensor] = {f"{name}_grad_feat_l{k}": leaf for k, leaf in enumerate(maps)}
    for k, conv in enumerate(adapters):
        leaves |= {f"{name}_grad_adapt_{part}_l{k}": leaf for part, leaf in conv.named_parameters()}
    held = {key: leaf for key, leaf in leaves.items() if key in case.arrays}
    total = torch.stack(list(losses.values())).sum()
    for key, gradient in zip(held, torch.autograd.grad(total, list(held.values())) if held else (), strict=True):
        compare(case, key, gradient)


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
    g = case.arrays
    pattern = r"([a-z]+)(_nobg)?_T(\d+(?:p\d+)?)_(?:grad_)?losskd_hcls(?:_back)?"
    names = {(k.split("_losskd")[0].removesuffix("_grad"), *m.groups()) for k, m in g.matching(pattern).items()}
    g.leave_out("labels|labels_nobg")  # inputs, of which a file may use one
    for name, form, labels_of, degrees in sorted(names, key=str):
        if form not in ("all", "fore", "back", "decouple"):
            continue  # no form of ours: fails by name
        labels, temperature = case.need(f"labels{labels_of or ''}", name), number(degrees)
        student = case.need("student_logits", name).clone().requires_grad_()
        teacher = case.need("teacher_logits", name)
        background = -1 if form == "all" else int(labels.max())
        positive, negative = decoupled_kl(student, teacher, labels.long(), background, temperature, temperature)
        positive = case.setting(CLS_WEIGHT, "losskd_hcls_weight") * positive
        negative = case.setting(CLS_WEIGHT, "losskd_hcls_back_weight") * negative
        losses = {"losskd_hcls": negative if form == "back" else positive}
        if form == "decouple":
            losses["losskd_hcls_back"] = negative
        for term, loss in losses.items():
            compare(case, f"{name}_{term}", loss.reshape(1))
            if f"{name}_grad_{term}" in g:
                (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
                compare(case, f"{name}_grad_{term}", gradient)
