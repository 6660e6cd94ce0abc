"""The reference files of BCKD: its class loss, and its box loss on one level and on all."""

from __future__ import annotations

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


def bckd_case(case: Case, batch: str) -> BCKDCase:
    """The inputs of a batch; the teacher's class logits lowered where the file's weights of the box term say so."""
    inputs, teacher = case.file("inputs_student"), case.file("inputs_teacher")
    cls, box = leaves(inputs, "cls", case.cls_shift()), leaves(inputs, "bbox")
    bins = box[0].shape[1] // 4
    bckd = BCKDCase(
        cls=cls,
        box=box,
        loc_weight=case.setting(4.0, "loss_score_kd_weight"),
        teacher_logits=flat([teacher[f"cls_l{k}"] for k in range(LEVELS)], (NUM_CLASSES,)),
        teacher_box=flat([teacher[f"bbox_l{k}"] for k in range(LEVELS)], (4, bins)),
        targets=make_targets(case, batch, canvas_of(inputs), ANCHOR_GRID, ATSS),
    )

    def error(shift: float) -> float:
        weight = replace(bckd, teacher_logits=bckd.teacher_logits + shift).weight.split(bckd.sizes, dim=1)
        held = case.arrays.matching(r"score_kd_weight_l(\d)") | case.arrays.matching(r"P(\d)_weight")
        assert held, f"{case.name} does not tell whether the teacher's scores are lowered: give teacher_cls_shift"
        levels = {key: int(found[1]) - (FINEST if key.startswith("P") else 0) for key, found in held.items()}
        return max(
            float((weight[k].reshape(-1) - case.arrays[key].reshape(-1)).abs().max()) for key, k in levels.items()
        )

    return replace(bckd, teacher_logits=bckd.teacher_logits + case.teacher_shift(error))


def check_bckd_cls(case: Case) -> None:
    """Class loss of single rows: each row, their mean, and weighted with the repository's module, for every exponent."""
    g = case.arrays
    powers = {found[1] for found in g.matching(r"beta(\d+(?:p\d+)?)_\w+").values()}
    assert powers
    for power in sorted(powers):
        name, beta = f"beta{power}", number(power)
        pred = g["pred"].clone().requires_grad_()
        rows = bckd_cls(pred, g["soft_label"], torch.ones(len(pred)), beta)
        weighted = bckd_cls(pred, g["soft_label"], g["weight"], beta).sum() / g["avg_factor"]
        assert_near(rows, g[f"{name}_loss_none"], f"{name} rows")
        forms = {"mean": rows.mean()}
        for found in g.matching(rf"{name}_loss_(module_lw(\d+(?:p\d+)?))").values():
            forms[found[1]] = number(found[2]) * weighted
        for form, loss in forms.items():
            assert_near(loss.reshape(1), g[f"{name}_loss_{form}"], f"{name} {form}")
            (gradient,) = torch.autograd.grad(loss, pred, retain_graph=True)
            assert_near(gradient, g[f"{name}_grad_{form}"], f"{name} gradient of {form}")


def check_bckd_loc(case: Case) -> None:
    """Class and box loss on single levels with their gradients, and the box loss of all levels in every form."""
    bckd = bckd_case(case, case.batch or "B")
    check_single_levels(case, bckd)
    check_forms(case, bckd)


def check_single_levels(case: Case, bckd: BCKDCase) -> None:
    """What the file holds of one level alone, P5 above all."""
    for level in sorted({found[1] for found in case.arrays.matching(r"P(\d)_\w+").values()}):
        pairs = of_level(bckd, int(level) - FINEST)
        for key in case.arrays.matching(rf"P{level}_(\w+)"):
            if key[3:] in pairs:
                ours, like = pairs[key[3:]]
                assert_near(ours, like(case.arrays[key]), key)


def of_level(bckd: BCKDCase, k: int) -> dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Everything of level ``k`` by name: ours, and what of the file is like it."""

    def level(rows: Tensor) -> Tensor:
        part: Tensor = rows.split(bckd.sizes, dim=1)[k]
        return part

    counted, vlr = level(bckd.counted), level(bckd.vlr())
    used = counted.bool().reshape(-1)  # the repository moves anchors outside the valid area to 0
    anchors = level(ANCHOR_GRID.anchors(bckd.targets.canvas)[None])
    classes = level(bckd.class_rows()).sum() / bckd.average
    pairs: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
        "avg_factor": (bckd.average, lambda x: x),
        "label_weights": (counted, lambda x: x),
        "labels": ((level(bckd.targets.assigned) >= 0).float(), lambda x: (x < NUM_CLASSES).float()),
        "weight": (level(bckd.weight).reshape(-1), lambda x: x),
        "weight_vlr": (level(bckd.weight)[vlr > 0], lambda x: x),
        "vlr": (vlr, lambda x: x.clamp(min=0)),  # -1 may mark anchors outside the valid area
        "anchors": (anchors * counted[..., None], lambda x: x),
        "decoded_student": (level(bckd.boxes(bckd.distribution)).reshape(-1, 4)[used], lambda x: x[used]),
        "decoded_teacher": (level(bckd.boxes(bckd.teacher_box)).reshape(-1, 4)[used], lambda x: x[used]),
        "loss_kd": (classes.reshape(1), lambda x: x),
        "grad_cls_loss_kd": (gradient_of(classes, bckd.cls[k]), lambda x: x),
    }
    for form in FORMS:
        rows = level(bckd.box_rows(form))
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
        for key in ours.keys() & g.keys():
            assert_near(ours[key], g[key], key)
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
