"""The reference files of BCKD's whole head: a GFL head of its own normalisation, BCKD's two terms, LD's as it carries them."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from golden_bckd import BCKDCase, bckd_case, check_forms, check_p5, levels_with_positives
from golden_case import ANCHOR_GRID, Case, assert_near, check_losses
from torch import Tensor

from kdcli.detectors.dense.losses import (
    DFL_MARGIN,
    DFL_WEIGHT,
    GIOU_WEIGHT,
    distribution_focal,
    gather_positives,
    gfl_loss,
)
from kdcli.geometry.boxes import aligned_giou, encode_distances
from kdcli.methods.divergence import kl_rows
from kdcli.methods.ld import MAIN_DIVISOR, VLR_DIVISOR

BOX_WEIGHT_EXTRA = 2e-4  # the repository adds 1e-4 to the scores and 1e-4 to the best of them
LD_WEIGHTS = (0.0, 0.25)  # of LD's own terms, in the repository's configs and by default: a file does not say which


def check_bckd_head(case: Case) -> None:
    """All losses with their gradients, the box term's weights and the counts.

    The head's imitation term (``loss_im``, weight 0 in its configs) is not ours.
    """
    kept = {k: v for k, v in case.arrays.items() if k != "loss_im" and not k.startswith("d_loss_im__")}
    bckd = with_teacher_shift(case, bckd_case(case))
    checked = check_p5(case, bckd) | check_forms(case, bckd)
    counts = {
        "num_total_samples": bckd.average,
        "avg_factor": bckd.average,
        "levels_with_positives": levels_with_positives(bckd),
        "cls_shift": torch.tensor(case.cls_shift()),
    }
    counts |= {f"score_kd_weight_l{k}": w.reshape(-1) for k, w in enumerate(bckd.weight.split(bckd.sizes, dim=1))}
    for key in counts.keys() & kept.keys():
        assert_near(counts[key].reshape(-1), kept[key].reshape(-1), key)
    names = {key for key in kept if key.startswith("loss_")}
    losses = {name: loss for name, loss in head_losses(bckd, kept).items() if name in names}
    check_losses(replace(case, arrays=kept), losses, {"cls": bckd.cls, "bbox": bckd.box})
    gradients = {key for key in kept if re.fullmatch(r"d_(loss_\w+)__d_(cls|bbox)_l\d(__(sum_c|sum_hw|idx|val))?", key)}
    unknown = set(kept) - checked - counts.keys() - names - gradients
    assert not unknown, f"no check for {sorted(unknown)}"


def with_teacher_shift(case: Case, bckd: BCKDCase) -> BCKDCase:
    """A file of lowered scores does not say whether the teacher's were lowered too; its weights of the box term do."""
    key, shift = "score_kd_weight_l0", case.cls_shift()
    if not shift or key not in case.arrays:
        return bckd
    lowered = replace(bckd, teacher_logits=bckd.teacher_logits + shift)

    def error(candidate: BCKDCase) -> float:
        first = candidate.weight[:, : candidate.sizes[0]]
        return float((first.reshape(-1) - case.arrays[key].reshape(-1)).abs().max())

    return min(bckd, lowered, key=error)


def head_losses(bckd: BCKDCase, golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every loss of the head summed over levels; the terms that it multiplies by 0 are 0."""
    vlr = bckd.vlr()
    edges = kl_rows(bckd.distribution, bckd.teacher_box, 10.0).sum(dim=-1)  # [B, N]
    nothing = 0 * bckd.distribution.sum()
    base, main = box_losses(bckd, edges)
    losses = {
        **base,
        "loss_ld": main,
        "loss_ld_vlr": (edges * vlr).sum() / VLR_DIVISOR,
        "loss_kd": bckd.per_level(bckd.class_rows()).sum() / bckd.average,
        "loss_kd_neg": nothing,
        "loss_score_kd": 4 * bckd.per_level(bckd.box_rows("giou")).sum() / bckd.average,
        "loss_score_kd_vlr": nothing,
        "loss_score_kd_vlr_raw": bckd.per_level(bckd.box_rows("giou") * (vlr > 0)).sum(),
    }
    for name in {"loss_ld", "loss_ld_vlr"} & golden.keys():
        ours, theirs = float(losses[name].detach()), float(golden[name].double().sum())
        losses[name] = min(LD_WEIGHTS, key=lambda weight: abs(weight * ours - theirs)) * losses[name]
    return losses


def box_losses(bckd: BCKDCase, edges: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """GFL's three losses, and main LD of weight 1, with this repository's weights of the positives."""
    targets = bckd.targets
    found = gather_positives(targets)
    place = (found.image, found.anchor)
    rows, boxes = bckd.distribution[place], bckd.boxes(bckd.distribution)[place]
    stride = ANCHOR_GRID.anchor_strides(targets.canvas, torch.float32)[found.anchor, None]
    goal = found.boxes / stride
    center = ANCHOR_GRID.centers(targets.canvas, torch.float32)[found.anchor] / stride
    distance = encode_distances(center, goal).clamp(0, rows.shape[-1] - 1 - DFL_MARGIN)
    weight = bckd.logits.detach()[place].sigmoid().amax(dim=-1) + BOX_WEIGHT_EXTRA
    total = weight.sum() + 1e-6
    base = gfl_loss(bckd.logits, bckd.distribution, targets, ANCHOR_GRID)
    losses = {
        "loss_cls": base["loss_cls"],
        "loss_bbox": GIOU_WEIGHT * ((1 - aligned_giou(boxes, goal)) * weight).sum() / total,
        "loss_dfl": DFL_WEIGHT * (distribution_focal(rows, distance).mean(dim=-1) * weight).sum() / total,
    }
    return losses, (edges[place] * weight).sum() / MAIN_DIVISOR
