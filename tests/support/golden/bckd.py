"""The reference files of BCKD: its class loss, and its box loss on one level and on all."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdcli.geometry.derive import decode_distribution
from kdcli.geometry.regions import RegionSpec, vlr_weights
from kdcli.methods.base import Pair
from kdcli.methods.bckd import BCKD, BOX, CLASSES, Overlap, bckd_cls, bckd_loc, level_gate, positives, score_gap
from kdcli.structures import IGNORED, Targets
from kdcli.tensors import TensorSpec
from tests.support.golden.case import (
    ANCHOR_GRID,
    ATSS,
    LEVELS,
    Case,
    assert_near,
    canvas_of,
    compare,
    flat,
    leaves,
    make_targets,
    number,
)
from tests.support.golden.ld import batch_of

NUM_CLASSES = 20
FORMS: dict[str, Overlap] = {"giou": "giou", "iou_linear": "iou", "iou_log": "log_iou"}
FINEST = 3  # P3: arrays that start with P5_ are of the third level


@dataclass(frozen=True)
class BCKDCase:
    """Both networks' outputs on a batch, everything [B, N, ...]."""

    cls: list[Tensor]  # student, one leaf a level
    box: list[Tensor]
    loc_weight: float  # of the box term
    teacher_logits: Tensor
    teacher_box: Tensor  # [B, N, 4, E]
    targets: Targets

    @property
    def sizes(self) -> list[int]:
        return ANCHOR_GRID.level_sizes(self.targets.canvas)

    @property
    def logits(self) -> Tensor:
        return flat(self.cls, (NUM_CLASSES,))

    @property
    def distribution(self) -> Tensor:
        return flat(self.box, self.teacher_box.shape[2:])

    @property
    def counted(self) -> Tensor:
        return (self.targets.assigned != IGNORED).float()

    @property
    def average(self) -> Tensor:
        return positives(self.targets.assigned >= 0, per_image=True)

    @property
    def weight(self) -> Tensor:
        """Of the box loss."""
        return score_gap(self.logits, self.teacher_logits) * self.counted

    def boxes(self, distribution: Tensor) -> Tensor:
        """Decoded, in strides."""
        storage = (self.targets.canvas, torch.float32)
        stride = ANCHOR_GRID.anchor_strides(*storage)
        return decode_distribution(
            distribution, ANCHOR_GRID.centers(*storage) / stride[:, None], torch.ones_like(stride)
        )

    def box_rows(self, form: str) -> Tensor:
        """The box loss of every anchor, [B, N]: not gated, not normalised, of weight 1."""
        return bckd_loc(self.boxes(self.distribution), self.boxes(self.teacher_box), self.weight, FORMS[form])

    def class_rows(self) -> Tensor:
        """The class loss of every anchor, [B, N]."""
        return bckd_cls(self.logits, self.teacher_logits, self.counted)

    def vlr(self) -> Tensor:
        """IoU weights [B, N] of the repository's own localization region."""
        spec = RegionSpec(vlr_metric="official")
        t = self.targets
        return torch.stack(
            [
                vlr_weights(spec, ANCHOR_GRID, t.canvas, boxes, (int(c[0]), int(c[1]))).float()
                for boxes, c in zip(t.boxes, t.content, strict=True)
            ]
        )

    def per_level(self, rows: Tensor, *, gated: bool = True) -> Tensor:
        """Sums [L] of rows [B, N]."""
        if gated:
            rows = rows * level_gate(self.targets.assigned >= 0, self.sizes)
        return torch.stack([part.sum() for part in rows.split(self.sizes, dim=1)])


def bckd_case(case: Case) -> BCKDCase:
    """The inputs of the batch; the teacher's class logits lowered where the file's weights of the box term say so."""
    inputs, teacher = case.file("inputs_student"), case.file("inputs_teacher")
    cls, box = leaves(inputs, "cls", case.cls_shift()), leaves(inputs, "bbox")
    bins = box[0].shape[1] // 4
    bckd = BCKDCase(
        cls=cls,
        box=box,
        loc_weight=case.setting(4.0, "loss_score_kd_weight"),
        teacher_logits=flat([teacher[f"cls_l{k}"] for k in range(LEVELS)], (NUM_CLASSES,)),
        teacher_box=flat([teacher[f"bbox_l{k}"] for k in range(LEVELS)], (4, bins)),
        targets=make_targets(case, case.batch, canvas_of(inputs), ANCHOR_GRID, ATSS),
    )

    def error(shift: float) -> float:
        weight = replace(bckd, teacher_logits=bckd.teacher_logits + shift).weight.split(bckd.sizes, dim=1)
        held = case.arrays.matching(r"score_kd_weight_l(\d)") | case.arrays.matching(r"P(\d)_weight")
        assert held, f"{case.name} does not tell whether the teacher's scores are lowered: give teacher_cls_shift"
        levels = {key: int(found[1]) - (FINEST if key.startswith("P") else 0) for key, found in held.items()}
        return max(
            float((weight[k].reshape(-1) - case.arrays[key].reshape(-1)).abs().amax()) for key, k in levels.items()
        )

    return replace(bckd, teacher_logits=bckd.teacher_logits + case.teacher_shift(error))


def check_bckd_cls(case: Case) -> None:
    """Class loss of single rows, where the file has it: each row, their mean, and weighted with the repository's module, for
    every exponent, with their gradients."""
    g = case.arrays
    found = {(m[1], m[2]) for m in g.matching(r"beta(\d+(?:p\d+)?)_(?:loss|grad)_(\w+)").values()}
    for power, form in sorted(found):
        name = f"beta{power}"
        pred = case.need("pred", name).clone().requires_grad_()
        label = case.need("soft_label", name)
        rows = bckd_cls(pred, label, torch.ones(len(pred), dtype=pred.dtype), number(power))
        if form == "none":
            compare(case, f"{name}_loss_none", rows)
            continue
        module = re.fullmatch(r"module_lw(\d+(?:p\d+)?)", form)
        if module:
            weight, average = (case.need(key, f"{name} {form}") for key in ("weight", "avg_factor"))
            loss = number(module[1]) * bckd_cls(pred, label, weight, number(power)).sum() / average
        elif form == "mean":
            loss = rows.mean()
        else:
            continue  # no form of ours: fails by name
        check_loss(case, f"{name}_loss_{form}", f"{name}_grad_{form}", loss, pred)
    g.leave_out("weight|avg_factor")  # inputs, of which a file may use some


def check_loss(case: Case, key: str, gradient: str, loss: Tensor, leaf: Tensor) -> None:
    """A loss and its gradient to ``leaf``, each where the file has it."""
    compare(case, key, loss.reshape(1))
    if gradient in case.arrays:
        compare(case, gradient, gradient_of(loss, leaf))


def check_bckd_loc(case: Case) -> None:
    """Class and box loss on single levels with their gradients, and the box loss of all levels in every form."""
    bckd = bckd_case(case)
    check_single_levels(case, bckd)
    check_forms(case, bckd)


def check_single_levels(case: Case, bckd: BCKDCase) -> None:
    """What the file holds of one level alone, P5 above all."""
    finest, coarsest = FINEST, FINEST + LEVELS - 1
    for level in sorted({found[1] for found in case.arrays.matching(rf"P([{finest}-{coarsest}])_\w+").values()}):
        pairs = of_level(bckd, int(level) - FINEST)
        for key in case.arrays.matching(rf"P{level}_(\w+)"):
            if key[3:] in pairs:
                ours, like = pairs[key[3:]]
                assert_near(ours, like(case.arrays.golden(key)), key)


def of_level(bckd: BCKDCase, k: int) -> dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Everything of level ``k`` by name: ours, and what of the file is like it."""

    def level(rows: Tensor) -> Tensor:
        part: Tensor = rows.split(bckd.sizes, dim=1)[k]
        return part

    counted, vlr = level(bckd.counted), level(bckd.vlr())
    used = counted.bool().reshape(-1)  # the repository moves anchors outside the valid area to 0
    anchors = level(ANCHOR_GRID.anchors(bckd.targets.canvas)[None])

    def zeroed(values: Tensor) -> Tensor:
        """Where the repository has an anchor of 0 outside the valid area, a decoded box means nothing."""
        return values.reshape(-1, 4)[used]

    classes = level(bckd.class_rows()).sum() / bckd.average
    pairs: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
        "avg_factor": (bckd.average, lambda x: x),
        "label_weights": (counted, lambda x: x),
        "labels": ((level(bckd.targets.assigned) >= 0).float(), lambda x: (x < NUM_CLASSES).float()),
        "weight": (level(bckd.weight).reshape(-1), lambda x: x),
        "weight_vlr": (level(bckd.weight)[vlr > 0], lambda x: x),
        "vlr": (vlr, lambda x: x.clamp(min=0)),  # -1 may mark anchors outside the valid area
        "anchors": (anchors * counted[..., None], lambda x: x * counted[..., None]),  # which may be there, or 0
        "decoded_student": (zeroed(level(bckd.boxes(bckd.distribution))), zeroed),
        "decoded_teacher": (zeroed(level(bckd.boxes(bckd.teacher_box))), zeroed),
        "score": (level(bckd.logits).sigmoid(), lambda x: x.reshape(counted.shape[0], -1, NUM_CLASSES)),
        "loss_kd": (classes.reshape(1), lambda x: x),
        "grad_cls_loss_kd": (gradient_of(classes, bckd.cls[k]), lambda x: x),
    }
    for form in FORMS:
        rows = level(bckd.box_rows(form))
        pairs[f"{form}_loss_none"] = (rows.reshape(-1), lambda x: x.reshape(-1))
        for suffix, loss in (("", bckd.loc_weight * rows.sum() / bckd.average), ("_vlr_raw", rows[vlr > 0].sum())):
            pairs[f"{form}_loss_score_kd{suffix}"] = (loss.reshape(1), lambda x: x)
            pairs[f"{form}_grad_bbox{suffix}"] = (gradient_of(loss, bckd.box[k]), lambda x: x)
    return pairs


def gradient_of(loss: Tensor, leaf: Tensor) -> Tensor:
    """The gradient, keeping the graph."""
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


def check_forms(case: Case, bckd: BCKDCase) -> None:
    """``<form>_loss_score_kd`` of every level, with the gate, and the method's own term."""
    g = case.arrays
    in_vlr = (bckd.vlr() > 0).float()
    for form in FORMS:
        rows = bckd.box_rows(form)
        ours = {
            f"{form}_loss_score_kd": bckd.loc_weight * bckd.per_level(rows) / bckd.average,
            f"{form}_loss_score_kd_vlr_raw": bckd.per_level(rows * in_vlr),
            f"{form}_levels_with_positives": levels_with_positives(bckd),
        }
        for key, values in ours.items():
            compare(case, key, values)
        if f"{form}_loss_score_kd" in g:
            loss = whole_method(bckd, FORMS[form])["loc"]
            assert_near(loss, g[f"{form}_loss_score_kd"].sum(), f"{form}: the method's own term")


def levels_with_positives(bckd: BCKDCase) -> Tensor:
    """Indices of the levels that the gate lets through."""
    return torch.nonzero(bckd.per_level((bckd.targets.assigned >= 0).float(), gated=False))[:, 0].int()


def whole_method(bckd: BCKDCase, iou: Overlap) -> dict[str, Tensor]:
    """The terms of the method itself, from boxes in pixels."""
    specs = {CLASSES.name: TensorSpec("anchor", (NUM_CLASSES,)), BOX.name: TensorSpec("anchor", (4,))}
    method = BCKD(Pair(specs, specs, ANCHOR_GRID, bckd.targets.canvas, "gfl"), iou=iou, loc_weight=bckd.loc_weight)
    stride = ANCHOR_GRID.anchor_strides(bckd.targets.canvas, torch.float32)[:, None]
    sides = (bckd.logits, bckd.distribution), (bckd.teacher_logits, bckd.teacher_box)
    student, teacher = ({CLASSES.key: z, BOX.key: bckd.boxes(box) * stride} for z, box in sides)
    terms: dict[str, Tensor] = method(student, teacher, batch_of(bckd.targets))
    return terms
