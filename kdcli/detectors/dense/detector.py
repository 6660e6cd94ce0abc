"""A dense detector: normalisation, backbone, neck and the one head, tied together by a recipe."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kdcli.detectors.backbones import Backbone
from kdcli.detectors.base import IMAGE_STD, Detector, ModelSpec
from kdcli.detectors.dense.decode import decode
from kdcli.detectors.dense.head import DenseHead
from kdcli.detectors.dense.recipes import Recipe
from kdcli.detectors.neck import FPN
from kdcli.geometry.boxes import decode_deltas, decode_distances
from kdcli.geometry.derive import decode_distribution
from kdcli.structures import Canvas, Detections, Targets
from kdcli.tensors import (
    BACKBONE,
    BOX_DISTRIBUTION,
    BOX_REGRESSION,
    CENTERNESS,
    CLS_LOGITS,
    FEATURES,
    Per,
    Tensors,
    TensorSpec,
    flatten_levels,
    per_level,
    precise,
)

STAGES = BACKBONE[1:]  # C3, C4, C5, on the grid's three finest levels


class DenseDetector(Detector):
    """``spec`` built by ``recipe`` with random weights; ``spec.bn`` is not ``auto`` here."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModelSpec, recipe: Recipe) -> None:
        super().__init__()
        assert spec.bn != "auto"
        self.spec = spec
        self.recipe = recipe
        self.grid = recipe.grid
        self.assigner = recipe.assigner
        self.region_defaults = recipe.regions
        self.box_dims = (4, spec.reg_max + 1) if recipe.box == "distribution" else (4,)
        self.register_buffer("mean", torch.tensor(spec.image_mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).reshape(3, 1, 1), persistent=False)
        self.backbone = Backbone(spec.backbone, bn=spec.bn, stride_in_1x1=spec.stride_in_1x1, dcn=spec.dcn)
        self.neck = FPN(self.backbone.channels, spec.fpn_channels, recipe.neck)
        self.head = DenseHead(
            spec.fpn_channels,
            spec.head_channels or spec.fpn_channels,
            spec.tower_convs,
            norm=recipe.norm,
            tower_bias=recipe.tower_bias,
            num_anchors=recipe.grid.num_anchors,
            num_classes=spec.num_classes,
            box_dims=self.box_dims,
            centerness=recipe.centerness,
            scaled_levels=len(recipe.grid.strides) if recipe.scaled else 0,
            activation=recipe.activation,
            strides=recipe.grid.strides,
        )

    def forward(self, images: Tensor) -> Tensors:
        """See Detector.forward."""
        stages = self.backbone(images.sub(self.mean).div_(self.std))
        maps = self.neck(stages)
        outputs = {FEATURES: flatten_levels(maps, (self.spec.fpn_channels,)), **self.head(maps)}
        # views in either memory format: they cost nothing where nobody reads them
        return outputs | {name: c.permute(0, 2, 3, 1).flatten(1, 2) for name, c in zip(STAGES, stages, strict=True)}

    def loss(self, outputs: Tensors, targets: Targets) -> dict[str, Tensor]:
        """See Detector.loss."""
        return self.recipe.loss(outputs, targets, self.grid)

    @torch.no_grad()
    def decode(self, outputs: Tensors, content: Tensor, canvas: Canvas) -> list[Detections]:
        """See Detector.decode. mmdet's rule: class score > 0.05, 1000 a level before NMS, 100 an image after it."""
        return decode(
            self.dense_boxes(outputs, canvas),
            outputs[CLS_LOGITS].float().sigmoid(),
            self.grid.level_sizes(canvas),
            content,
            centerness=outputs[CENTERNESS][..., 0].float().sigmoid() if CENTERNESS in outputs else None,
            nms_iou=self.recipe.nms_iou,
        )

    @property
    def box_name(self) -> str:
        """See Detector.box_name."""
        return BOX_DISTRIBUTION if self.recipe.box == "distribution" else BOX_REGRESSION

    def decode_boxes(self, box_tensor: Tensor, index: Tensor, canvas: Canvas) -> Tensor:
        """See Detector.decode_boxes."""
        place = (canvas, torch.float32, box_tensor.device)
        with torch.autocast(box_tensor.device.type, enabled=False):  # bf16 boxes would be off by pixels
            rows = precise(box_tensor)
            if self.recipe.box == "delta":
                return decode_deltas(self.grid.anchors(*place)[index], rows, self.recipe.box_stds)
            centers = self.grid.centers(*place)[index // self.grid.num_anchors]
            strides = self.grid.anchor_strides(*place)[index]
            if self.recipe.box == "distance":
                return decode_distances(centers, rows * strides[:, None])
            return decode_distribution(rows, centers, strides)

    def dense_boxes(self, outputs: Tensors, canvas: Canvas) -> Tensor:
        """See Detector.dense_boxes."""
        rows = outputs[self.box_name]
        batch, total = rows.shape[:2]
        index = torch.arange(total, device=rows.device).repeat(batch)
        return self.decode_boxes(rows.flatten(0, 1), index, canvas).reshape(batch, total, 4)

    def specs(self) -> Mapping[str, TensorSpec]:
        """See Detector.specs."""
        specs = {
            FEATURES: TensorSpec(Per.CELL, (self.spec.fpn_channels,)),
            CLS_LOGITS: TensorSpec(Per.ANCHOR, (self.spec.num_classes,)),
            self.box_name: TensorSpec(Per.ANCHOR, self.box_dims),
        }
        if self.recipe.centerness:
            specs[CENTERNESS] = TensorSpec(Per.ANCHOR, (1,))
        for level, (name, channels) in enumerate(zip(STAGES, self.backbone.channels, strict=True)):
            specs[name] = TensorSpec(per_level(level), (channels,))
        return specs
