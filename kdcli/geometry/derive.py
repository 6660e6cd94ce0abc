"""Tensors that are derived from a detector's outputs by one function each, used by live and cached teachers alike."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcli.geometry.boxes import aligned_iou, decode_distances
from kdcli.tensors import precise


def integral(distribution: Tensor) -> Tensor:
    """Expected distance of each edge, [..., 4] in strides, of edge logits [..., 4, E] (GFL, arXiv 2006.04388).

    Not a matrix product, which autocast would do in bf16: 16 strides of 128 px would be off by 4 px.
    """
    bins = torch.arange(distribution.shape[-1], dtype=torch.float32, device=distribution.device)
    return (precise(distribution).softmax(dim=-1) * bins).sum(dim=-1)


def decode_distribution(distribution: Tensor, centers: Tensor, strides: Tensor) -> Tensor:
    """Boxes [..., 4] in canvas pixels of edge logits [..., 4, E], centres [..., 2] (pixels) and strides [...]."""
    return decode_distances(centers, integral(distribution) * strides[..., None])


def rank(cls_logits: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Tensor:
    """What rank mimicking compares at a positive: the score of its ground-truth class and its IoU, [M, 2].

    ``cls_logits`` [M, K], ``boxes`` [M, 4] decoded, ``gt_boxes`` [M, 4], ``gt_labels`` [M]. Differentiable.
    """
    score = precise(cls_logits).gather(1, gt_labels[:, None]).squeeze(1).sigmoid()
    return torch.stack([score, aligned_iou(precise(boxes), precise(gt_boxes))], dim=-1)
