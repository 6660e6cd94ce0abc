"""Box arithmetic: overlaps and the codings that heads predict in. Boxes are ``xyxy``.

The overlaps follow mmdet (union and hull clamped at eps) and not torchvision (eps added), so that the losses agree with
the reference numbers. The pairwise ones are [G, N], one coordinate at a time: N is 22,400 for an image of 800x1344.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-6  # mmdet's eps of bbox_overlaps and GIoULoss
LOG_RATIO_CLIP = abs(math.log(16 / 1000))  # mmdet's wh_ratio_clip: no box is decoded to more than 62.5 x its anchor


def area(boxes: Tensor) -> Tensor:
    """Areas [...] of boxes [..., 4]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    """Intersection areas of broadcastable boxes [..., 4]."""
    width = torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])
    height = torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])
    return width.clamp(min=0) * height.clamp(min=0)


def _iou(a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(IoU, union area) of broadcastable boxes."""
    inter = _intersection(a, b)
    union = (area(a) + area(b) - inter).clamp(min=eps)
    return inter / union, union


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of every box of ``a`` [G, 4] with every box of ``b`` [N, 4]: [G, N]."""
    return _iou(a[:, None], b[None], EPS)[0]


def aligned_iou(a: Tensor, b: Tensor, eps: float = EPS) -> Tensor:
    """IoU [...] of box pairs [..., 4], differentiable."""
    return _iou(a, b, eps)[0]


def aligned_giou(a: Tensor, b: Tensor, eps: float = EPS) -> Tensor:
    """Generalized IoU [...] (arXiv 1902.09630) of box pairs [..., 4], differentiable, in -1..1."""
    iou, union = _iou(a, b, eps)
    top_left = torch.minimum(a[..., :2], b[..., :2])
    bottom_right = torch.maximum(a[..., 2:], b[..., 2:])
    hull = (bottom_right - top_left).clamp(min=0).prod(dim=-1).clamp(min=eps)
    return iou - (hull - union) / hull


def aligned_ciou(a: Tensor, b: Tensor, eps: float = EPS) -> Tensor:
    """Complete IoU [...] (arXiv 1911.08287, eq. 10) of predicted boxes ``a`` [..., 4] with true ones ``b``, differentiable
    in ``a``: IoU - rho^2 / c^2 - alpha v.

    alpha = v / (1 - IoU + v) gets no gradient and holds at every IoU, as in LD's repository; mmdet 3.3.0 sets it to 0 where
    the IoU is at most 0.5.
    """
    iou, _ = _iou(a, b, eps)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0)
    apart = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]).square().sum(dim=-1) / 4
    wide_a, wide_b = (torch.atan((x[..., 2] - x[..., 0]) / (x[..., 3] - x[..., 1] + eps)) for x in (a, b))
    v = 4 / math.pi**2 * (wide_b - wide_a).square()
    with torch.no_grad():
        alpha = v / (1 - iou + v).clamp(min=eps)
    return iou - apart / hull.square().sum(dim=-1).clamp(min=eps) - alpha * v


def encode_deltas(anchors: Tensor, boxes: Tensor, stds: tuple[float, float, float, float]) -> Tensor:
    """Boxes [M, 4] as (dx, dy, log w, log h) relative to anchors [M, 4], divided by ``stds``: [M, 4]."""
    size_a, size_b = anchors[..., 2:] - anchors[..., :2], boxes[..., 2:] - boxes[..., :2]
    center_a, center_b = (anchors[..., 2:] + anchors[..., :2]) / 2, (boxes[..., 2:] + boxes[..., :2]) / 2
    deltas = torch.cat([(center_b - center_a) / size_a, torch.log(size_b / size_a)], dim=-1)
    return deltas / deltas.new_tensor(stds)


def decode_deltas(anchors: Tensor, deltas: Tensor, stds: tuple[float, float, float, float]) -> Tensor:
    """The inverse of ``encode_deltas``; a side changes by at most a factor of 62.5. Anchors broadcast over images."""
    deltas = deltas * deltas.new_tensor(stds)
    size_a, center_a = anchors[..., 2:] - anchors[..., :2], (anchors[..., 2:] + anchors[..., :2]) / 2
    center = center_a + deltas[..., :2] * size_a
    half = size_a * deltas[..., 2:].clamp(-LOG_RATIO_CLIP, LOG_RATIO_CLIP).exp() / 2
    return torch.cat([center - half, center + half], dim=-1)


def encode_distances(centers: Tensor, boxes: Tensor) -> Tensor:
    """Distances [..., 4] (left, top, right, bottom) from centres [..., 2] to the edges of boxes [..., 4]."""
    return torch.cat([centers - boxes[..., :2], boxes[..., 2:] - centers], dim=-1)


def decode_distances(centers: Tensor, distances: Tensor) -> Tensor:
    """The inverse of ``encode_distances``: boxes [..., 4]."""
    return torch.cat([centers - distances[..., :2], centers + distances[..., 2:]], dim=-1)
