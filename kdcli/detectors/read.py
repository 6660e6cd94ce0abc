"""Reads what a need names from a detector's outputs: the one function for student, live teacher and store writer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kdcli.detectors.base import Detector
from kdcli.geometry import derive
from kdcli.structures import Entries, Targets
from kdcli.tensors import CLS_LOGITS, RANK, Need, Tensors


def read(
    detector: Detector, outputs: Tensors, needs: Iterable[Need], entries: Entries | None, targets: Targets
) -> Tensors:
    """Tensors by ``Need.key``: dense ones whole, sparse ones gathered at the entries of their region; differentiable.

    ``rank`` is derived here: the ground-truth-class score and the IoU of each positive's decoded box.
    """
    read_tensors = {}
    for need in needs:
        if need.dense:
            read_tensors[need.key] = outputs[need.name]
            continue
        assert entries is not None
        chosen = entries.select(need.region)
        image, index = entries.image[chosen], entries.index[chosen]
        if need.name == RANK:
            logits = _gather(outputs[CLS_LOGITS], image, index)
            boxes = detector.decode_boxes(_gather(outputs[detector.box_name], image, index), index, targets.canvas)
            counts = torch.tensor([len(b) for b in targets.boxes], device=index.device)
            place = (counts.cumsum(0) - counts)[image] + entries.gt[chosen]
            gt_boxes, gt_labels = torch.cat(targets.boxes)[place], torch.cat(targets.labels)[place]
            read_tensors[need.key] = derive.rank(logits, boxes, gt_boxes, gt_labels)
        else:
            read_tensors[need.key] = _gather(outputs[need.name], image, index)
    return read_tensors


def _gather(value: Tensor, image: Tensor, index: Tensor) -> Tensor:
    """Rows [M, ...] of ``value`` [B, N, ...]. The backward of index_select adds whole rows, that of value[image, index]
    single elements."""
    return value.flatten(0, 1).index_select(0, image * value.shape[1] + index)
