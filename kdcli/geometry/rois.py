"""Features of the ground-truth boxes, aligned to 3x3 cells: one function for live teacher, store writer and student."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import roi_align

from kdcli.geometry.grid import Grid
from kdcli.structures import Canvas
from kdcli.tensors import precise

ROI_LEVELS = 2  # the two finest levels, as DRKD's code reads every box on both
ROI_SIZE = 3


def gt_rois(features: Tensor, boxes: list[Tensor], grid: Grid, canvas: Canvas) -> Tensor:
    """RoIAlign of every box on the two finest levels: [sum G, 2, C, 3, 3] float32, rows in the order of ``boxes``.

    ``features`` [B, P, C]; ``boxes`` B x [G, 4], xyxy canvas pixels. torchvision's defaults, as in DRKD's code (arXiv
    2302.05637): scale 1/stride, no half-cell shift (``aligned=False``), ceil(bin size) samples per bin and side. Computed
    in float32 whatever the precision of ``features``: the CPU kernel refuses bf16. Differentiable in ``features``.
    """
    levels = grid.level_maps(precise(features), canvas, ROI_LEVELS)
    regions = []
    for maps, stride in zip(levels, grid.strides[:ROI_LEVELS], strict=True):
        regions.append(roi_align(maps, [b.to(maps) for b in boxes], ROI_SIZE, spatial_scale=1 / stride))
    return torch.stack(regions, dim=1)
