"""The reference files of LD: mmdet's head with main LD, and the LD repository's with VLR LD and class KD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcli.detectors.dense.losses import gather_positives, gfl_loss
from kdcli.geometry.derive import decode_distribution
from kdcli.geometry.regions import RegionSpec, compute_entries, fine_grained_cells, vlr_weights
from kdcli.methods.divergence import kl_rows
from kdcli.methods.ld import MAIN_DIVISOR, VLR_DIVISOR, class_kd, weighted_sum
from kdcli.methods.ld_imitation import general_instances, level_mean_square, level_of, levels_with_positives
from kdcli.structures import Batch, Entries, RowKey, Targets
from tests.support.golden.case import (
    ANCHOR_GRID,
    ATSS,
    LEVELS,
    Case,
    by_level,
    canvas_of,
    check_losses,
    flat,
    leaves,
    make_targets,
)

NUM_CLASSES = 20
IMITATIONS = ("finegrained", "fitnet", "gibox")  # of the repository's; its decouple cannot run
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class LDCase:
    """Both networks' outputs on a batch and the places where LD reads them."""

    case: Case
    cls: list[Tensor]  # student, one leaf a level
    box: list[Tensor]
    targets: Targets
    entries: Entries
    edges: Tensor  # [M] KL over the four edges of every entry

    @property
    def logits(self) -> Tensor:
        return flat(self.cls, (NUM_CLASSES,))

    @property
    def level(self) -> Tensor:
        """Of each entry, [M]."""
        return level_of(self.entries.index, ANCHOR_GRID, batch_of(self.targets))

    def main_loss(self, on: Tensor) -> Tensor:
        """Main LD of the entries ``on`` [M] bool."""
        main = self.entries.select("main") & on
        score = self.logits[self.entries.image[main], self.entries.index[main]].detach().sigmoid().amax(dim=-1)
        weight = self.case.setting(0.25, "loss_ld_weight", "ld_weight")
        return weight * weighted_sum(self.edges[main], score, MAIN_DIVISOR)

    def vlr_loss(self, on: Tensor) -> Tensor:
        """VLR LD of the entries ``on``."""
        vlr = self.entries.select("vlr") & on
        weight = self.case.setting(0.25, "loss_ld_vlr_weight", "ld_vlr_weight")
        return weight * weighted_sum(self.edges[vlr], self.entries.weight[vlr], VLR_DIVISOR)

    def with_levels(self, terms: Callable[[Tensor], Terms]) -> tuple[Terms, Terms]:
        """GFL's losses and ``terms`` of some entries: their values, and the same by level."""
        losses, levels = gfl_of(self.cls, self.box, self.targets, eps=1e-6)
        parts = [terms(self.level == k) for k in range(LEVELS)]
        losses |= terms(torch.ones_like(self.level, dtype=torch.bool))
        return losses, levels | {name: torch.stack([part[name].detach() for part in parts]) for name in parts[0]}


def gfl_of(cls: list[Tensor], box: list[Tensor], targets: Targets, eps: float | None) -> tuple[Terms, Terms]:
    """GFL's losses, and the same by level; ``eps`` as in ``gfl_loss``."""
    outputs = flat(cls, (NUM_CLASSES,)), flat(box, (4, box[0].shape[1] // 4))

    def loss(part: Targets) -> Terms:
        return gfl_loss(*outputs, part, ANCHOR_GRID, eps=eps)

    def norms(part: Targets) -> dict[str, float]:
        found = gather_positives(part)
        total = float(outputs[0].detach()[found.image, found.anchor].amax(dim=-1).sigmoid().sum())
        total = max(total, 1.0) if eps is None else total + eps
        return {"loss_cls": float(found.average), "loss_bbox": total, "loss_dfl": total}

    return loss(targets), by_level(loss, norms, targets, ANCHOR_GRID.level_sizes(targets.canvas))


def ld_case(case: Case) -> LDCase:
    """Read student and teacher inputs at the positives and at the official VLR of the batch."""
    inputs, teacher = case.file("inputs_student"), case.file("inputs_teacher")
    cls, box = leaves(inputs, "cls", case.cls_shift()), leaves(inputs, "bbox")
    targets = make_targets(case, case.batch, canvas_of(inputs), ANCHOR_GRID, ATSS)
    spec, both = RegionSpec(vlr_metric="official"), frozenset({"main", "vlr"})
    parts = [
        compute_entries(both, spec, ANCHOR_GRID, targets.canvas, b, a, (int(c[0]), int(c[1])))
        for b, a, c in zip(targets.boxes, targets.assigned, targets.content, strict=True)
    ]
    entries = Entries.collate(parts)
    trailing = (4, box[0].shape[1] // 4)
    storage = (entries.image, entries.index)
    ours, theirs = flat(box, trailing)[storage], flat([teacher[f"bbox_l{k}"] for k in range(LEVELS)], trailing)[storage]
    temperature = case.setting(10.0, "loss_ld_T", "ld_T", "T")
    return LDCase(case, cls, box, targets, entries, kl_rows(ours, theirs, temperature).sum(dim=-1))


def check_ld_mmdet3(case: Case) -> None:
    """mmdet's LDHead: GFL with 1e-6 added to its normaliser, and LD on the positives."""
    ld = ld_case(case)
    losses, levels = ld.with_levels(lambda on: {"loss_ld": ld.main_loss(on)})
    check_losses(case, losses, {"cls": ld.cls, "bbox": ld.box}, levels)


def check_ld_repo(case: Case) -> None:
    """The LD repository's head: GFL, main LD, VLR LD, class KD and an imitation term."""
    ld = ld_case(case)
    teacher = teacher_logits(case)
    features, im_levels = imitation_of(case, ld, teacher) if holds(case, "loss_im") else ([], None)
    kd_weight = case.setting(10.0, "loss_kd_weight", "kd_weight")
    temperature = case.setting(2.0, "loss_kd_T", "kd_T")

    def terms(on: Tensor) -> Terms:
        main = ld.entries.select("main") & on
        storage = (ld.entries.image[main], ld.entries.index[main])
        classes = ld.logits[storage], teacher[storage]
        return {
            "loss_ld": ld.main_loss(on),
            "loss_ld_vlr": ld.vlr_loss(on),
            "loss_kd": kd_weight * class_kd(*classes, ld.level[main], LEVELS, temperature),
            "loss_kd_neg": 0 * ld.logits.sum(),  # the repository multiplies it by 0
        }

    losses, levels = ld.with_levels(terms)
    if im_levels is not None:
        losses["loss_im"], levels["loss_im"] = im_levels.sum(), im_levels
    check_losses(case, losses, {"cls": ld.cls, "bbox": ld.box, "feat": features}, levels)


def holds(case: Case, name: str) -> bool:
    """Whether the file has the loss ``name`` or a gradient of it."""
    return name in case.arrays or any(key.startswith(f"d_{name}__d_") for key in case.arrays)


def imitation_of(case: Case, ld: LDCase, teacher: Tensor) -> tuple[list[Tensor], Tensor]:
    """The student's feature leaves and the imitation term by level [L], weighted."""
    imitation = case.chosen("imitation", IMITATIONS)
    assert imitation is not None, f"{case.name}: its name has none of {', '.join(IMITATIONS)}, which loss_im depends on"
    features = [leaf.requires_grad_() for leaf in features_of(case, "student")]
    weight = case.setting(2.0, "loss_im_weight", "im_weight")

    def error(shift: float) -> float:
        assert "loss_im" in case.arrays, (
            f"{case.name} does not tell whether the teacher's scores are lowered: give teacher_cls_shift"
        )
        loss = weight * imitation_loss(case, ld, teacher + shift, imitation, features).sum()
        return abs(float(loss.detach()) - float(case.arrays["loss_im"].sum()))

    # the other losses do not change when all class logits of the teacher do by the same number
    return features, weight * imitation_loss(case, ld, teacher + case.teacher_shift(error), imitation, features)


def teacher_logits(case: Case) -> Tensor:
    """The teacher's class logits [B, N, K] as the inputs have them."""
    return flat([case.file("inputs_teacher")[f"cls_l{k}"] for k in range(LEVELS)], (NUM_CLASSES,))


def features_of(case: Case, side: str) -> list[Tensor]:
    """The rank-1 feature maps [2, 256, H, W] of ``student`` or ``teacher``, a level each."""
    arrays = case.file("batches")
    channels = arrays[f"feat_{side}_a"]
    return [channels[:, :, None, None] * arrays[f"feat_{side}_b_l{k}"][:, None] for k in range(LEVELS)]


def imitation_loss(case: Case, ld: LDCase, theirs: Tensor, imitation: str, features: list[Tensor]) -> Tensor:
    """The imitation term of weight 1 by level, [L]: 0 on levels without positives. ``theirs``: teacher's class logits."""
    image, cell, level = imitated(case, ld, theirs, imitation)
    width = (features[0].shape[1],)
    ours, goal = flat(features, width), flat(features_of(case, "teacher"), width)
    gate = levels_with_positives(ld.level[ld.entries.select("main")], LEVELS)
    found = []
    for k in range(LEVELS):
        on = (image[level == k], cell[level == k])
        found.append(level_mean_square(ours[on], goal[on], level[level == k], gate))
    return torch.stack(found)


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
    storage = (canvas, torch.float32)
    edges = [flat(maps, (4, maps[0].shape[1] // 4)) for maps in (
        ld.box, [case.file("inputs_teacher")[f"bbox_l{k}"] for k in range(LEVELS)]
    )]  # fmt: skip
    boxes = [decode_distribution(e, ANCHOR_GRID.centers(*storage), ANCHOR_GRID.anchor_strides(*storage)) for e in edges]
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
    """The repository's picks ``gi_idx_l<k>`` on the flattened images of a batch."""
    held = sorted(int(found[1]) for found in case.arrays.matching(r"gi_idx_l(\d)").values())
    if not held:
        return
    ld, theirs = ld_case(case), teacher_logits(case)
    sizes = ANCHOR_GRID.level_sizes(ld.targets.canvas)

    def picks(shift: float) -> list[list[int]]:
        image, cell, level = general_instances_of_batch(case, ld, theirs + shift)
        flattened = [(image * size + cell - sum(sizes[:k]))[level == k] for k, size in enumerate(sizes)]
        return [part.tolist() for part in flattened]

    golden = {k: case.arrays.golden(f"gi_idx_l{k}").long().tolist() for k in held}
    shift = case.teacher_shift(lambda s: sum(picks(s)[k] != golden[k] for k in held))
    ours = picks(shift)
    for k in held:
        assert ours[k] == golden[k], f"{case.name} gi_idx_l{k}: {ours[k]} against {golden[k]}"


def batch_of(targets: Targets) -> Batch:
    """A batch that has targets and no pixels."""
    pixels = torch.zeros(len(targets.boxes), 3, *targets.canvas.size, dtype=torch.uint8)
    return Batch(pixels, targets, [RowKey(i, "identity") for i in range(len(targets.boxes))])
