"""Reads what a need names from a detector's outputs: the one function for student, live teacher and store writer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from kdcli.detectors.base import Detector
from kdcli.geometry import derive
from kdcli.geometry.rois import gt_rois
from kdcli.structures import Entries, Targets
from kdcli.tensors import (
    BOXES,
    CLS_LOGITS,
    FEATURES,
    GT_ROIS,
    PROPOSAL_BOXES,
    PROPOSAL_COUNT,
    PROPOSAL_LABELS,
    PROPOSAL_LOGITS,
    RANK,
    Need,
    Per,
    Region,
    Tensors,
    TensorSpec,
)

AT_PROPOSALS = Need(PROPOSAL_BOXES, Region.PROPOSALS), Need(PROPOSAL_LOGITS, Region.PROPOSALS)


def read(
    detector: Detector, outputs: Tensors, needs: Iterable[Need], entries: Entries | None, targets: Targets,
    proposals: list[Tensor] | None = None,
) -> Tensors:  # fmt: skip
    """Tensors by ``Need.key``: dense ones whole, sparse ones gathered at the entries of their region; differentiable.

    ``rank``, ``boxes`` and ``gt_rois`` are derived here. ``proposals``: boxes [R, 4] of each image where the RoI head is
    read, only for needs on the region ``proposals``.
    """
    read_tensors: Tensors = {}
    specs = detector.specs()
    for need in needs:
        if need.region == Region.PROPOSALS:
            continue
        if need.name == BOXES:
            read_tensors[need.key] = detector.dense_boxes(outputs, targets.canvas)
        elif need.dense:
            read_tensors[need.key] = outputs[need.name]
        elif need.name == GT_ROIS:
            # RoIAlign reads one cell beyond a box: padding is 0 on both sides, as in a store
            inside = outputs[FEATURES].masked_fill(~targets.valid[..., None], 0)
            read_tensors[need.key] = gt_rois(inside, targets.boxes, detector.grid, targets.canvas)
        else:
            assert entries is not None
            read_tensors[need.key] = _at_entries(detector, specs, outputs, need, entries, targets)
    if proposals is not None:
        boxes, logits = AT_PROPOSALS
        read_tensors[boxes.key] = torch.cat(proposals)
        read_tensors[logits.key] = detector.proposal_logits(outputs, proposals, targets.canvas)
    return read_tensors


def sample_proposals(student: Detector, teacher: Tensors, targets: Targets) -> tuple[Tensors, list[Tensor]]:
    """Draw the proposals that this step trains on, as the student's RoI head would, from the teacher's list.

    Returns the teacher's tensors with only the drawn rows, and with their ``proposals/labels``; and the drawn boxes of
    each image. DeFeat (arXiv 2103.14475) in the form that a store can hold exactly: docs/methods/defeat.md.
    """
    boxes, logits = AT_PROPOSALS
    counts = teacher[PROPOSAL_COUNT].tolist()
    listed = list(torch.split(teacher[boxes.key], counts))
    chosen, labels = student.sample_proposals(listed, targets)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    place = torch.cat([index + start for index, start in zip(chosen, starts, strict=True)])
    drawn = {
        **teacher,
        boxes.key: teacher[boxes.key][place],
        logits.key: teacher[logits.key][place],
        PROPOSAL_LABELS: labels,
    }
    return drawn, [part[index] for part, index in zip(listed, chosen, strict=True)]


def _at_entries(
    detector: Detector, specs: Mapping[str, TensorSpec], outputs: Tensors, need: Need, entries: Entries,
    targets: Targets,
) -> Tensor:  # fmt: skip
    chosen = entries.select(need.region)
    image, index = entries.image[chosen], entries.index[chosen]
    if need.name != RANK:
        per_cell = specs[need.name].per == Per.CELL
        return _gather(outputs[need.name], image, index // detector.grid.num_anchors if per_cell else index)
    logits = _gather(outputs[CLS_LOGITS], image, index)
    boxes = detector.decode_boxes(_gather(outputs[detector.box_name], image, index), index, targets.canvas)
    counts = torch.tensor([len(b) for b in targets.boxes], device=index.device)
    place = (counts.cumsum(0) - counts)[image] + entries.gt[chosen]
    return derive.rank(logits, boxes, torch.cat(targets.boxes)[place], torch.cat(targets.labels)[place])


def _gather(value: Tensor, image: Tensor, index: Tensor) -> Tensor:
    """Rows [M, ...] of ``value`` [B, N, ...]. The backward of index_select adds whole rows, that of value[image, index]
    single elements."""
    return value.flatten(0, 1).index_select(0, image * value.shape[1] + index)
