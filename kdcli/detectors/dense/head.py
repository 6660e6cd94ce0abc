"""The one head of all dense detectors: a class tower and a box tower, shared by the levels, then prediction convs.

Initialised as mmdet does: conv weights normal with std 0.01, class bias such that every score starts at 0.01 (focal
loss, arXiv 1708.02002).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kdcli.tensors import BOX_DISTRIBUTION, BOX_REGRESSION, CENTERNESS, CLS_LOGITS, Tensors, flatten_levels, precise

Norm = Literal["group", "none"]
Tower = Literal["cls", "box"]
Activation = Literal["none", "relu", "exp"]

PRIOR = 0.01  # score of every anchor before training


class DenseHead(nn.Module):
    """in_channels: of the neck. channels, convs: width and depth of each tower. norm: GroupNorm after each, or none.
    tower_bias: convs keep their bias also under GroupNorm.

    num_anchors: A. num_classes: K. box_dims: (4,) for a regression, (4, E) for a distribution; the channel of anchor a,
    side s, bin e is (a*4 + s)*E + e, mmdet's order. centerness: the tower of a third prediction.
    scaled_levels: number of learnt per-level factors on the box prediction, 0 for none. activation: what makes distances
    in strides, never negative, of the box prediction: ``relu`` takes it for strides, ``exp`` for the logarithm of pixels,
    which are divided by ``strides`` (pixels, of each level).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        convs: int,
        *,
        norm: Norm,
        tower_bias: bool = False,
        num_anchors: int,
        num_classes: int,
        box_dims: tuple[int, ...],
        centerness: Tower | None = None,
        scaled_levels: int = 0,
        activation: Activation = "none",
        strides: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.box_dims = box_dims
        self.centerness_tower = centerness
        self.activation = activation
        self.strides = tuple(strides)
        groups = group_count(channels) if norm == "group" and convs else None
        bias = groups is None or tower_bias
        self.cls_tower = _tower(in_channels, channels, convs, groups, bias)
        self.box_tower = _tower(in_channels, channels, convs, groups, bias)
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
            front, side = self.cls_tower(x), self.box_tower(x)
            logits.append(self.cls(front))
            box = self.box(side)
            boxes.append(self._activate(box if self.scales is None else box * self.scales[level], level))
            if self.centerness is not None:
                centerness.append(self.centerness(side if self.centerness_tower == "box" else front))
        outputs = {
            CLS_LOGITS: flatten_levels(logits, (self.num_classes,)),
            BOX_DISTRIBUTION if len(self.box_dims) == 2 else BOX_REGRESSION: flatten_levels(boxes, self.box_dims),
        }
        if centerness:
            outputs[CENTERNESS] = flatten_levels(centerness, (1,))
        return outputs

    def _activate(self, box: Tensor, level: int) -> Tensor:
        if self.activation == "none":
            return box
        box = precise(box)  # bf16 has a step of 2 px at 300 px, fp16 ends at 65504
        return box.relu() if self.activation == "relu" else box.exp() / self.strides[level]


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


def _tower(in_channels: int, channels: int, convs: int, groups: int | None, bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for k in range(convs):
        layers.append(nn.Conv2d(in_channels if k == 0 else channels, channels, 3, padding=1, bias=bias))
        if groups is not None:
            layers.append(GroupNorm(groups, channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
