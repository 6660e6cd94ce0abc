"""Recipes of torchvision's own detectors, where its conventions differ from mmdet's: ``tv_retinanet`` and so on.

Common to all: anchors and points lie canvas // cells apart, not a stride; a point is at its cell's corner; base anchors
are rounded; P7 reads relu(P6). Numbers are torchvision 0.29's. A student of the same name has the same anchors, which
methods that compare anchor by anchor ask for. It is trained with kdcli's losses: torchvision's RetinaNet v2 learns its
boxes with GIoU instead of L1, its FCOS does not weight boxes by their centerness.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kdcli.detectors.base import ModelSpec
from kdcli.detectors.dense.decode import decode
from kdcli.detectors.dense.detector import DenseDetector
from kdcli.detectors.dense.recipes import FCOS, RETINANET, Recipe, with_options
from kdcli.detectors.neck import NeckSpec
from kdcli.detectors.two_stage.detector import TwoStageDetector
from kdcli.detectors.two_stage.recipes import (
    FASTER_RCNN,
    MMDET_LOW_QUALITY,
    MMDET_POOLING,
    MMDET_TRAINING,
    TwoStageRecipe,
)
from kdcli.errors import OptionError, did_you_mean
from kdcli.geometry.grid import Grid
from kdcli.structures import Canvas, Detections
from kdcli.tensors import CENTERNESS, CLS_LOGITS, Tensors

FCOS_SCORE_THRESHOLD = 0.2  # of the root below; torchvision's default


def _torchvision_grid(grid: Grid) -> Grid:
    return replace(grid, offset=0.0, stride_rule="image_over_grid", rounded_base=True)


TV_RETINANET = replace(
    RETINANET,
    name="tv_retinanet",
    grid=_torchvision_grid(RETINANET.grid),
    neck=NeckSpec(p6_from="p5", relu_before_p7=True),
)
TV_RETINANET_V2 = replace(
    TV_RETINANET, name="tv_retinanet_v2", norm="group", neck=NeckSpec(p6_from="c5", relu_before_p7=True)
)
TV_FCOS = replace(FCOS, name="tv_fcos", grid=_torchvision_grid(FCOS.grid), scaled=False)
TV_FASTER_RCNN = replace(FASTER_RCNN, name="tv_faster_rcnn", grid=_torchvision_grid(FASTER_RCNN.grid))
TV_FASTER_RCNN_V2 = replace(TV_FASTER_RCNN, name="tv_faster_rcnn_v2", rpn_convs=2, roi_convs=4, neck_norm=True)

TORCHVISION: dict[str, Recipe | TwoStageRecipe] = {
    recipe.name: recipe for recipe in (TV_RETINANET, TV_RETINANET_V2, TV_FCOS, TV_FASTER_RCNN, TV_FASTER_RCNN_V2)
}

MM_FASTER_RCNN = replace(  # mmdet 3.3.0's faster-rcnn_r50_fpn_1x_coco; docs/decisions/0024-mmdet-faster-rcnn.md
    FASTER_RCNN,
    name="mm_faster_rcnn",
    pooling=MMDET_POOLING,
    training=MMDET_TRAINING,
    low_quality=MMDET_LOW_QUALITY,
    smooth_l1_beta=0.0,
    count_missing=True,
    own_boxes=True,
    proposal_side=0.0,
    detection_side=0.0,
    mmdet_init=True,
    lr=0.02,
)


class TorchvisionFcos(DenseDetector):
    """FCOS whose score is the root of class score and centerness (arXiv 2006.09214), not their product."""

    @torch.no_grad()
    def decode(self, outputs: Tensors, content: Tensor, canvas: Canvas) -> list[Detections]:
        """See Detector.decode. Anchors are chosen by the root, above 0.2; 1000 a level, 100 an image."""
        product = outputs[CLS_LOGITS].float().sigmoid() * outputs[CENTERNESS].float().sigmoid()
        return decode(
            self.dense_boxes(outputs, canvas),
            product.sqrt(),
            self.grid.level_sizes(canvas),
            content,
            score_thr=FCOS_SCORE_THRESHOLD,
            nms_iou=self.recipe.nms_iou,
        )


def build_torchvision(spec: ModelSpec) -> DenseDetector | TwoStageDetector:
    """The detector of ``spec``, whose ``detector`` is a name of TORCHVISION and ``bn`` is not ``auto``, with
    random weights. Raises OptionError on another name."""
    if spec.detector not in TORCHVISION:
        raise OptionError(f"detector '{spec.detector}': unknown{did_you_mean(spec.detector, TORCHVISION)}")
    recipe = TORCHVISION[spec.detector]
    if isinstance(recipe, TwoStageRecipe):
        return TwoStageDetector(spec, recipe)
    recipe = with_options(recipe, spec)
    return TorchvisionFcos(spec, recipe) if spec.detector == TV_FCOS.name else DenseDetector(spec, recipe)
