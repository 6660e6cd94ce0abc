"""The reference files of LD: mmdet's head with main LD, and the LD repository's with VLR LD and class KD."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from golden_case import (
    ANCHOR_GRID,
    ATSS,
    LEVELS,
    Case,
    canvas_of,
    check_losses,
    flat,
    leaves,
    make_targets,
)
from torch import Tensor

from kdcli.detectors.dense.losses import gfl_loss
from kdcli.geometry.regions import RegionSpec, compute_entries
from kdcli.methods.divergence import kl_rows
from kdcli.methods.ld import MAIN_DIVISOR, VLR_DIVISOR, class_kd, level_of, weighted_sum
from kdcli.structures import Batch, Entries, RowKey, Targets

NUM_CLASSES = 20


@dataclass(frozen=True)
class LDCase:
    """Both networks' outputs on a batch and the places where LD reads them."""

    cls: list[Tensor]  # student, one leaf a level
    box: list[Tensor]
    targets: Targets
    entries: Entries
    edges: Tensor  # [M] KL over the four edges of every entry, T 10
    base: dict[str, Tensor]  # the student's own GFL losses, as LD's heads normalise them

    @property
    def logits(self) -> Tensor:
        return flat(self.cls, (NUM_CLASSES,))

    def main_loss(self) -> Tensor:
        """Main LD, weight .25."""
        main = self.entries.select("main")
        score = self.logits[self.entries.image[main], self.entries.index[main]].detach().sigmoid().amax(dim=-1)
        loss: Tensor = 0.25 * weighted_sum(self.edges[main], score, MAIN_DIVISOR)
        return loss


def ld_case(case: Case, batch: str) -> LDCase:
    """Read student and teacher inputs at the positives and at the official VLR of ``batch``."""
    inputs, teacher = case.file("inputs_student"), case.file("inputs_teacher")
    cls, box = leaves(inputs, "cls", case.cls_shift()), leaves(inputs, "bbox")
    targets = make_targets(case, batch, canvas_of(inputs), ANCHOR_GRID, ATSS)
    spec, both = RegionSpec(vlr_metric="official"), frozenset({"main", "vlr"})
    parts = [
        compute_entries(both, spec, ANCHOR_GRID, targets.canvas, b, a, (int(c[0]), int(c[1])))
        for b, a, c in zip(targets.boxes, targets.assigned, targets.content, strict=True)
    ]
    entries = Entries.collate(parts)
    trailing = (4, box[0].shape[1] // 4)
    place = (entries.image, entries.index)
    ours, theirs = flat(box, trailing)[place], flat([teacher[f"bbox_l{k}"] for k in range(LEVELS)], trailing)[place]
    base = gfl_loss(flat(cls, (NUM_CLASSES,)), flat(box, trailing), targets, ANCHOR_GRID, eps=1e-6)
    return LDCase(cls, box, targets, entries, kl_rows(ours, theirs, 10.0).sum(dim=-1), base)


def check_ld_mmdet3(case: Case) -> None:
    """mmdet's LDHead: GFL with 1e-6 added to its normaliser, and LD on the positives."""
    ld = ld_case(case, case.batch)
    check_losses(case, {**ld.base, "loss_ld": ld.main_loss()}, {"cls": ld.cls, "bbox": ld.box})


def check_ld_repo(case: Case) -> None:
    """The LD repository's head: GFL, main LD, VLR LD and class KD. Its imitation term is not ours yet."""
    batch, _, imitation = case.batch.partition("_")
    assert imitation, f"{case.name}: write ld_repo_<batch>_<imitation>"
    ld = ld_case(case, batch)
    vlr, main = ld.entries.select("vlr"), ld.entries.select("main")
    place = (ld.entries.image[main], ld.entries.index[main])
    theirs = flat([case.file("inputs_teacher")[f"cls_l{k}"] for k in range(LEVELS)], (NUM_CLASSES,))[place]
    level = level_of(ld.entries.index[main], ANCHOR_GRID, batch_of(ld.targets))
    losses = {
        **ld.base,
        "loss_ld": ld.main_loss(),
        "loss_ld_vlr": 0.25 * weighted_sum(ld.edges[vlr], ld.entries.weight[vlr], VLR_DIVISOR),
        "loss_kd": 10 * class_kd(ld.logits[place], theirs, level, LEVELS, 2.0),
        "loss_kd_neg": 0 * ld.logits.sum(),  # the repository multiplies it by 0
    }
    kept = {k: v for k, v in case.arrays.items() if k != "loss_im" and not k.startswith("d_loss_im__")}
    check_losses(replace(case, arrays=kept), losses, {"cls": ld.cls, "bbox": ld.box})


def batch_of(targets: Targets) -> Batch:
    """A batch that has targets and no pixels."""
    pixels = torch.zeros(len(targets.boxes), 3, *targets.canvas.size, dtype=torch.uint8)
    return Batch(pixels, targets, [RowKey(i, "identity") for i in range(len(targets.boxes))])
