"""The reference files of LD: mmdet's head with main LD, and the LD repository's with VLR LD and class KD."""

from __future__ import annotations

from dataclasses import dataclass

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
from kdcli.geometry.derive import decode_distribution
from kdcli.geometry.regions import RegionSpec, compute_entries, fine_grained_cells, vlr_weights
from kdcli.methods.divergence import kl_rows
from kdcli.methods.ld import MAIN_DIVISOR, VLR_DIVISOR, class_kd, level_of, weighted_sum
from kdcli.methods.ld_imitation import general_instances, level_mean_square, levels_with_positives
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
    """The LD repository's head: GFL, main LD, VLR LD, class KD and an imitation term."""
    batch, _, imitation = case.batch.partition("_")
    assert imitation, f"{case.name}: write ld_repo_<batch>_<imitation>"
    ld = ld_case(case, batch)
    vlr, main = ld.entries.select("vlr"), ld.entries.select("main")
    place = (ld.entries.image[main], ld.entries.index[main])
    theirs = flat([case.file("inputs_teacher")[f"cls_l{k}"] for k in range(LEVELS)], (NUM_CLASSES,))
    level = level_of(ld.entries.index[main], ANCHOR_GRID, batch_of(ld.targets))
    features, teacher = features_of(case, "student"), features_of(case, "teacher")
    for leaf in features:
        leaf.requires_grad_()
    image, cell, of_level = imitated(case, ld, theirs, imitation)
    width = (features[0].shape[1],)
    losses = {
        **ld.base,
        "loss_ld": ld.main_loss(),
        "loss_ld_vlr": 0.25 * weighted_sum(ld.edges[vlr], ld.entries.weight[vlr], VLR_DIVISOR),
        "loss_kd": 10 * class_kd(ld.logits[place], theirs[place], level, LEVELS, 2.0),
        "loss_kd_neg": 0 * ld.logits.sum(),  # the repository multiplies it by 0
        "loss_im": 2 * level_mean_square(
            flat(features, width)[image, cell], flat(teacher, width)[image, cell], of_level,
            levels_with_positives(level, LEVELS),
        ),
    }  # fmt: skip
    check_losses(case, losses, {"cls": ld.cls, "bbox": ld.box, "feat": features})


def features_of(case: Case, side: str) -> list[Tensor]:
    """The rank-1 feature maps [2, 256, H, W] of ``student`` or ``teacher``, a level each."""
    arrays = case.file("batches")
    channels = arrays[f"feat_{side}_a"]
    return [channels[:, :, None, None] * arrays[f"feat_{side}_b_l{k}"][:, None] for k in range(LEVELS)]


def imitated(case: Case, ld: LDCase, theirs: Tensor, imitation: str) -> tuple[Tensor, Tensor, Tensor]:
    """(image, cell, level) of what the repository imitates: cells near a box, inside a box, or general instances."""
    canvas, targets = ld.targets.canvas, ld.targets
    sizes = ANCHOR_GRID.level_sizes(canvas)
    if imitation in ("finegrained", "fitnet"):
        masks = []
        for boxes, content in zip(targets.boxes, targets.content, strict=True):
            size = (int(content[0]), int(content[1]))
            if imitation == "finegrained":
                masks.append(fine_grained_cells(ANCHOR_GRID, canvas, boxes, size))
            else:
                masks.append(vlr_weights(RegionSpec(vlr_metric="inside"), ANCHOR_GRID, canvas, boxes, size) > 0)
        image, cell = torch.nonzero(torch.stack(masks), as_tuple=True)
        ends = torch.tensor(sizes).cumsum(0)
        return image, cell, torch.bucketize(cell, ends, right=True)
    assert imitation == "gibox", f"{case.name}: imitation '{imitation}' is unknown"
    return general_instances_of_batch(case, ld, theirs)


def general_instances_of_batch(case: Case, ld: LDCase, theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The repository's picks, over all images of a level at once."""
    canvas = ld.targets.canvas
    sizes = ANCHOR_GRID.level_sizes(canvas)
    place = (canvas, torch.float32)
    edges = [flat(maps, (4, maps[0].shape[1] // 4)) for maps in (
        ld.box, [case.file("inputs_teacher")[f"bbox_l{k}"] for k in range(LEVELS)]
    )]  # fmt: skip
    boxes = [decode_distribution(e, ANCHOR_GRID.centers(*place), ANCHOR_GRID.anchor_strides(*place)) for e in edges]
    image, cell, level, start = [], [], [], 0
    for k, size in enumerate(sizes):
        part = slice(start, start + size)
        tensors = (ld.logits.sigmoid(), theirs.sigmoid(), *boxes)
        kept = general_instances(*(t[:, part].flatten(0, 1) for t in tensors))
        image.append(kept // size)
        cell.append(kept % size + start)
        level.append(torch.full_like(kept, k))
        start += size
    return torch.cat(image), torch.cat(cell), torch.cat(level)


def check_general_instances(case: Case) -> None:
    """The repository's picks ``gi_idx_l<k>`` on the flattened images of batch B."""
    keys = [key for key in case.arrays if key.startswith("gi_idx_l")]
    if not keys:
        return
    ld = ld_case(case, "B")
    theirs = flat([case.file("inputs_teacher")[f"cls_l{k}"] for k in range(LEVELS)], (NUM_CLASSES,))
    image, cell, level = general_instances_of_batch(case, ld, theirs)
    start = 0
    for k, size in enumerate(ANCHOR_GRID.level_sizes(ld.targets.canvas)):
        mine = (image * size + cell - start)[level == k]
        assert mine.tolist() == case.arrays[f"gi_idx_l{k}"].tolist(), f"level {k}"
        start += size


def batch_of(targets: Targets) -> Batch:
    """A batch that has targets and no pixels."""
    pixels = torch.zeros(len(targets.boxes), 3, *targets.canvas.size, dtype=torch.uint8)
    return Batch(pixels, targets, [RowKey(i, "identity") for i in range(len(targets.boxes))])
