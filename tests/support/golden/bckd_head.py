"""The reference files of BCKD's whole head: a GFL head of its own normalisation, BCKD's two terms, LD's as it carries them."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcli.detectors.dense.losses import DFL_MARGIN, DFL_WEIGHT, GIOU_WEIGHT, distribution_focal, gather_positives
from kdcli.geometry.boxes import aligned_giou, encode_distances
from kdcli.methods.divergence import kl_rows
from kdcli.methods.ld import MAIN_DIVISOR, VLR_DIVISOR
from tests.support.golden.bckd import BCKDCase, bckd_case, check_forms, check_single_levels, levels_with_positives
from tests.support.golden.case import ANCHOR_GRID, LEVELS, Case, assert_near, check_losses
from tests.support.golden.ld import IMITATIONS, features_of, gfl_of, holds, imitation_loss, ld_case

BOX_WEIGHT_EXTRA = 2e-4  # the repository adds 1e-4 to the scores and 1e-4 to the best of them


def check_bckd_head(case: Case) -> None:
    """All losses by level with their gradients, the box term's weights and the counts."""
    bckd = bckd_case(case)
    check_single_levels(case, bckd)
    check_forms(case, bckd)
    counts = {
        "num_total_samples": bckd.average,
        "avg_factor": bckd.average,
        "levels_with_positives": levels_with_positives(bckd),
    }
    counts |= {f"score_kd_weight_l{k}": w for k, w in enumerate(bckd.weight.split(bckd.sizes, dim=1))}
    for key, ours in counts.items():
        if key in case.arrays:
            golden = case.arrays.golden(key)
            assert_near(ours.reshape(-1).float(), golden.reshape(-1).float(), key)
    base, levels = gfl_of(bckd.cls, bckd.box, bckd.targets, eps=None)
    by_level = {**head_losses(case, bckd), "loss_cls": levels["loss_cls"]}
    inputs = {"cls": bckd.cls, "bbox": bckd.box}
    if holds(case, "loss_im"):
        inputs["feat"] = [leaf.requires_grad_() for leaf in features_of(case, "student")]
        # the released configurations, which give it weight 0, name finegrained
        imitation = case.chosen("imitation", IMITATIONS) or IMITATIONS[0]
        loss = imitation_loss(case, ld_case(case), bckd.teacher_logits, imitation, inputs["feat"])
        by_level["loss_im"] = switched(case, "loss_im", 2.0) * loss
    losses = {name: loss.sum() for name, loss in by_level.items()}
    check_losses(case, losses | {"loss_cls": base["loss_cls"]}, inputs, by_level)


def switched(case: Case, name: str, default: float) -> float:
    """The weight of a term that the released configurations switch off: 0 where all that the file has of it is 0."""
    on = bool(case.arrays[name].any()) if name in case.arrays else False
    return case.setting(default if on else 0.0, f"{name}_weight")


def head_losses(case: Case, bckd: BCKDCase) -> dict[str, Tensor]:
    """Every loss of the head but GFL's class loss, by level [L]; the terms that it multiplies by 0 are 0."""
    vlr = bckd.vlr()
    temperature = case.setting(10.0, "loss_ld_T", "ld_T", "T")
    edges = kl_rows(bckd.distribution, bckd.teacher_box, temperature).sum(dim=-1)  # [B, N]
    boxes, main = box_losses(bckd, edges)
    rows = bckd.box_rows("giou")
    nothing = 0 * bckd.per_level(edges)
    return {
        **boxes,
        "loss_ld": switched(case, "loss_ld", 0.25) * main,
        "loss_ld_vlr": switched(case, "loss_ld_vlr", 0.25) * bckd.per_level(edges * vlr, gated=False) / VLR_DIVISOR,
        "loss_kd": case.setting(1.0, "loss_kd_weight") * bckd.per_level(bckd.class_rows()) / bckd.average,
        "loss_kd_neg": nothing,
        "loss_score_kd": bckd.loc_weight * bckd.per_level(rows) / bckd.average,
        "loss_score_kd_vlr": nothing,
        "loss_score_kd_vlr_raw": bckd.per_level(rows * (vlr > 0)),
    }


def box_losses(bckd: BCKDCase, edges: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """GFL's two box losses, and main LD of weight 1, by level, with this repository's weights of the positives."""
    targets = bckd.targets
    found = gather_positives(targets)
    storage = (found.image, found.anchor)
    rows, boxes = bckd.distribution[storage], bckd.boxes(bckd.distribution)[storage]
    stride = ANCHOR_GRID.anchor_strides(targets.canvas, torch.float32)[found.anchor, None]
    goal = found.boxes / stride
    center = ANCHOR_GRID.centers(targets.canvas, torch.float32)[found.anchor] / stride
    distance = encode_distances(center, goal).clamp(0, rows.shape[-1] - 1 - DFL_MARGIN)
    weight = bckd.logits.detach()[storage].sigmoid().amax(dim=-1) + BOX_WEIGHT_EXTRA
    total = weight.sum() + 1e-6
    level = torch.bucketize(found.anchor, torch.tensor(bckd.sizes).cumsum(0), right=True)

    def by_level(values: Tensor) -> Tensor:
        return values.new_zeros(LEVELS).index_add(0, level, values * weight)

    losses = {
        "loss_bbox": GIOU_WEIGHT * by_level(1 - aligned_giou(boxes, goal)) / total,
        "loss_dfl": DFL_WEIGHT * by_level(distribution_focal(rows, distance).mean(dim=-1)) / total,
    }
    return losses, by_level(edges[storage]) / MAIN_DIVISOR
