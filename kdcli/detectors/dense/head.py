"""The one head of all dense detectors: a class tower and a box tower, shared by the levels, then prediction convs.

Initialised as mmdet does: conv weights normal with std 0.01, class bias such that every score starts at 0.01 (focal
loss, arXiv 1708.02002).
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from kdcli.tensors import BOX_DISTRIBUTION, BOX_REGRESSION, CENTERNESS, CLS_LOGITS, Tensors, flatten_levels

Norm = Literal["group", "none"]

PRIOR = 0.01  # score of every anchor before training


class DenseHead(nn.Module):
    """in_channels: of the neck. channels, convs: width and depth of each tower. norm: GroupNorm after each, or none.

    num_anchors: A. num_classes: K. box_dims: (4,) for a regression, (4, E) for a distribution; the channel of anchor a,
    side s, bin e is (a*4 + s)*E + e, golden's order. centerness: a third prediction, from the box tower.
    scaled_levels: number of learnt per-level factors on the box prediction, 0 for none.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        convs: int,
        *,
        norm: Norm,
        num_anchors: int,
        num_classes: int,
        box_dims: tuple[int, ...],
        centerness: bool = False,
        scaled_levels: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.box_dims = box_dims
        groups = group_count(channels) if norm == "group" and convs else None
        self.cls_tower = _tower(in_channels, channels, convs, groups)
        self.box_tower = _tower(in_channels, channels, convs, groups)
        width = channels if convs else in_channels
        self.cls = nn.Conv2d(width, num_anchors * num_classes, 3, padding=1)
        self.box = nn.Conv2d(width, num_anchors * math.prod(box_dims), 3, padding=1)
        self.centerness = nn.Conv2d(width, num_anchors, 3, padding=1) if centerness else None
        self.scales = nn.Parameter(torch.ones(scaled_levels)) if scaled_levels else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        assert self.cls.bias is not None
        nn.init.constant_(self.cls.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, features: list[Tensor]) -> Tensors:
        """``cls_logits`` [B, N, K], the box tensor [B, N, *box_dims] and ``centerness`` [B, N, 1] of P3..P7."""
        logits, boxes, centerness = [], [], []
        for level, x in enumerate(features):
            logits.append(self.cls(self.cls_tower(x)))
            side = self.box_tower(x)
            box = self.box(side)
            boxes.append(box if self.scales is None else box * self.scales[level])
            if self.centerness is not None:
                centerness.append(self.centerness(side))
        outputs = {
            CLS_LOGITS: flatten_levels(logits, (self.num_classes,)),
            BOX_DISTRIBUTION if len(self.box_dims) == 2 else BOX_REGRESSION: flatten_levels(boxes, self.box_dims),
        }
        if centerness:
            outputs[CENTERNESS] = flatten_levels(centerness, (1,))
        return outputs


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm``, which refuses batch 1 where a group is one value: P7 of a canvas up to 128, 32 channels."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x`` [B, C, H, W]; a group of one value becomes the bias, whatever the batch."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def group_count(channels: int) -> int:
    """32 groups if they divide ``channels``, else the largest divisor below 32, with a warning that says so."""
    groups = max(g for g in range(1, 33) if channels % g == 0)
    if groups != 32:
        warnings.warn(f"head of {channels} channels: GroupNorm has {groups} groups instead of 32", stacklevel=2)
    return groups


def _tower(in_channels: int, channels: int, convs: int, groups: int | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for k in range(convs):
        layers.append(nn.Conv2d(in_channels if k == 0 else channels, channels, 3, padding=1, bias=groups is None))
        if groups is not None:
            layers.append(GroupNorm(groups, channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
