"""FCOS against mmdet's FCOSHead: the plain form, and that with normalised targets, centre sampling and GIoU."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcli.detectors.dense.losses import centerness_target, fcos_loss, gather_positives
from kdcli.geometry.assign import AssignerSpec
from kdcli.geometry.boxes import encode_distances
from kdcli.geometry.grid import Grid
from kdcli.structures import Targets
from tests.support.golden.case import Case, canvas_of, check_losses, compare, flat, leaves, make_targets

NUM_CLASSES = 20
POINTS = Grid(offset=0.5)
EVERYWHERE = AssignerSpec("fcos")
CENTERED = AssignerSpec("fcos", center_radius=1.5)


def check_fcos(case: Case) -> None:
    """Plain: distances in pixels, -log IoU, positives anywhere inside a box in their level's range."""
    _check(case, EVERYWHERE, "bbox", normalised=False)


def check_fcosplus(case: Case) -> None:
    """Distances in strides, GIoU, positives near the centre of their box."""
    _check(case, CENTERED, "bboxnorm", normalised=True)


def _check(case: Case, spec: AssignerSpec, box_input: str, *, normalised: bool) -> None:
    inputs = case.file("inputs_fcos")
    cls = leaves(case.file("inputs_student"), "cls", case.cls_shift())
    box, centerness = leaves(inputs, box_input), leaves(inputs, "centerness")
    targets = make_targets(case, case.batch, canvas_of(inputs), POINTS, spec)
    _check_targets(case, targets, in_strides=normalised)
    # the head hands over strides in both forms
    strides = [level if normalised else level / s for level, s in zip(box, POINTS.strides, strict=True)]
    losses = fcos_loss(
        flat(cls, (NUM_CLASSES,)), flat(strides, (4,)), flat(centerness, (1,)), targets, POINTS, log_iou=not normalised
    )
    # losses of one number for all levels: by level there is nothing to compare
    check_losses(case, losses, {"cls": cls, "bbox": box, "centerness": centerness}, levels={})


def _check_targets(case: Case, targets: Targets, *, in_strides: bool) -> None:
    """Labels and distances of every point of each level; the positives' centerness, ordered by level, image, point."""
    found, canvas = gather_positives(targets), targets.canvas
    centers = POINTS.centers(canvas, torch.float32)[found.anchor]
    goal = encode_distances(centers, found.boxes)
    if in_strides:
        goal = goal / POINTS.anchor_strides(canvas, torch.float32)[found.anchor, None]
    labels = torch.full(targets.assigned.shape, NUM_CLASSES)
    labels[found.image, found.anchor] = found.labels
    boxes = torch.zeros(*targets.assigned.shape, 4)
    boxes[found.image, found.anchor] = goal
    whole: dict[str, Tensor] = {"labels": labels, "bbox_targets": boxes}
    for name, value in whole.items():
        for number, part in enumerate(value.split(POINTS.level_sizes(canvas), dim=1)):
            compare(case, f"{name}_l{number}", part)
    ends = torch.tensor(POINTS.level_sizes(canvas)).cumsum(0)
    level = torch.bucketize(found.anchor, ends, right=True)
    order = torch.argsort(level * len(targets.boxes) + found.image, stable=True)
    ours = centerness_target(centers, found.boxes)[order]
    compare(case, "centerness_targets_pos", ours)
    compare(case, "avg_factor", torch.tensor([float(max(len(found.anchor), 1))]))
