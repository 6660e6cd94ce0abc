"""Faster R-CNN (arXiv 1506.01497) opened into forward, loss and decode.

``forward`` gives what depends on the image alone: the neck's maps and the RPN's dense outputs. Everything that chooses
(proposals, samples, NMS) and the RoI head on what was chosen happens in ``loss``, ``decode`` and ``proposal_logits``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from kdcli.detectors.backbones import Backbone
from kdcli.detectors.base import IMAGE_STD, Detector, ModelSpec
from kdcli.detectors.two_stage.initialise import initialise
from kdcli.detectors.two_stage.losses import roi_loss, rpn_loss
from kdcli.detectors.two_stage.matching import DISTILLATION_SAMPLE, ROI_SAMPLE, SampleRule, sample_proposals
from kdcli.detectors.two_stage.proposals import find_proposals
from kdcli.detectors.two_stage.recipes import (
    DISTILLATION,
    ROI_WIDTH,
    TESTING,
    ProposalRule,
    TwoStageRecipe,
)
from kdcli.detectors.two_stage.roi import RoIHead, detect, pool
from kdcli.errors import OptionError
from kdcli.geometry.regions import RegionSpec
from kdcli.structures import Canvas, Detections, Targets
from kdcli.tensors import (
    BACKBONE,
    FEATURES,
    PROPOSAL_BOXES,
    PROPOSAL_LOGITS,
    Per,
    Tensors,
    TensorSpec,
    flatten_levels,
    per_level,
    precise,
)

RPN_LOGITS = "rpn_logits"  # [B, N, 1] whether an anchor holds any object, before the sigmoid
RPN_DELTAS = "rpn_deltas"  # [B, N, 4] offsets from the anchors


class TwoStageDetector(Detector):
    """``spec`` built by ``recipe`` with random weights; ``spec.bn`` is not ``auto`` here.

    ``spec.head_channels`` is the width of the RoI head's linear layers, 1024 when it is None (14 million parameters
    with 256 channels: small students set it); ``spec.tower_convs`` and ``spec.reg_max`` are not used. Raises OptionError
    on a ``spec.box`` or ``spec.box_loss`` other than the default.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModelSpec, recipe: TwoStageRecipe) -> None:
        super().__init__()
        assert spec.bn != "auto"
        if spec.box != "default":
            raise OptionError(f"model.box = '{spec.box}': {spec.name} has no dense box branch; leave it out")
        if spec.box_loss != "default":
            raise OptionError(f"model.box_loss = '{spec.box_loss}': {spec.name} has no dense box branch; leave it out")
        self.spec = spec
        self.recipe = recipe
        self.grid = recipe.grid
        self.assigner = recipe.assigner
        self.region_defaults = RegionSpec()
        self.register_buffer("mean", torch.tensor(spec.image_mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).reshape(3, 1, 1), persistent=False)
        self.backbone = Backbone(spec.backbone, bn=spec.bn, stride_in_1x1=spec.stride_in_1x1, dcn=spec.dcn)
        norm = nn.BatchNorm2d if recipe.neck_norm else None
        channels = spec.fpn_channels
        self.neck = FeaturePyramidNetwork(
            list(self.backbone.stage_channels), channels, extra_blocks=LastLevelMaxPool(), norm_layer=norm
        )
        self.rpn = RPNHead(channels, recipe.grid.num_anchors, conv_depth=recipe.rpn_convs)
        self.roi = RoIHead(channels, spec.head_channels or ROI_WIDTH, spec.num_classes, recipe.roi_convs)
        if recipe.mmdet_init:
            initialise(self.neck, self.roi)

    def forward(self, images: Tensor) -> Tensors:
        """See Detector.forward."""
        stages = self.backbone.stages(images.sub(self.mean).div_(self.std))
        maps = list(self.neck(dict(zip(BACKBONE, stages, strict=True))).values())
        logits, deltas = self.rpn(maps)
        return {
            FEATURES: flatten_levels(maps, (self.spec.fpn_channels,)),
            RPN_LOGITS: flatten_levels(logits, (1,)),
            RPN_DELTAS: flatten_levels(deltas, (4,)),
            # views in either memory format: they cost nothing where nobody reads them
            **{name: c.permute(0, 2, 3, 1).flatten(1, 2) for name, c in zip(BACKBONE, stages, strict=True)},
        }

    def loss(self, outputs: Tensors, targets: Targets) -> dict[str, Tensor]:
        """See Detector.loss. loss_rpn_cls, loss_rpn_box, loss_cls, loss_bbox; samples follow ``targets.draws``.

        ``targets.assigned`` is not read: the RPN takes every anchor that ties for a box's highest IoU, an assigner one.
        """
        listed = [
            torch.cat([found, boxes])
            for found, boxes in zip(
                self._proposals(outputs, targets.content, targets.canvas, self.recipe.training),
                targets.boxes,
                strict=True,
            )
        ]
        indices, labels, goals = self._sample(listed, targets, ROI_SAMPLE)
        chosen = [boxes[index] for boxes, index in zip(listed, indices, strict=True)]
        logits, deltas = self.roi_outputs(outputs, chosen, targets.canvas)
        return {
            **rpn_loss(outputs[RPN_LOGITS], outputs[RPN_DELTAS], targets, self.recipe),
            **roi_loss(
                logits, deltas, torch.cat(chosen), torch.cat(labels), torch.cat(goals), self.recipe.smooth_l1_beta
            ),
        }

    @torch.no_grad()
    def decode(self, outputs: Tensors, content: Tensor, canvas: Canvas) -> list[Detections]:
        """See Detector.decode. torchvision's and mmdet's rule: 1000 proposals, score > 0.05, NMS 0.5, 100 an image."""
        proposals = self._proposals(outputs, content, canvas, TESTING)
        counts = [len(boxes) for boxes in proposals]
        logits, deltas = self.roi_outputs(outputs, proposals, canvas)
        parts = zip(torch.split(logits, counts), torch.split(deltas, counts), proposals, content, strict=True)
        return [detect(*part, self.recipe.detection_side) for part in parts]

    def proposals(self, outputs: Tensors, content: Tensor, canvas: Canvas) -> list[Tensor]:
        """See Detector.proposals. At most 1000 an image, [R, 4] float32, clipped to ``content`` [B, 2]: what DeFeat
        (arXiv 2103.14475) reads of a teacher; ground-truth boxes are not among them."""
        return self._proposals(outputs, content, canvas, DISTILLATION)

    def proposal_logits(self, outputs: Tensors, boxes: list[Tensor], canvas: Canvas) -> Tensor:
        """See Detector.proposal_logits."""
        return self.roi_outputs(outputs, boxes, canvas)[0]

    def roi_outputs(self, outputs: Tensors, boxes: list[Tensor], canvas: Canvas) -> tuple[Tensor, Tensor]:
        """Logits [sum R, K + 1] (background last) and deltas [sum R, K, 4] of ``boxes`` ([R, 4] of each image, xyxy
        canvas pixels); differentiable towards the features and the head."""
        logits, deltas = self.roi(pool(outputs[FEATURES], boxes, self.grid, canvas, self.recipe.pooling))
        return precise(logits), precise(deltas)

    def sample_proposals(self, boxes: list[Tensor], targets: Targets) -> tuple[list[Tensor], Tensor]:
        """See Detector.sample_proposals. 512 an image, at most 25 % of them positives (IoU >= 0.5)."""
        indices, labels, _ = self._sample(boxes, targets, DISTILLATION_SAMPLE)
        return indices, torch.cat(labels)

    @property
    def box_name(self) -> str:
        """Raises OptionError: a two-stage detector has no dense boxes."""
        self._no_dense_boxes()

    def decode_boxes(self, box_tensor: Tensor, index: Tensor, canvas: Canvas) -> Tensor:
        """Raises OptionError, as ``box_name``."""
        self._no_dense_boxes()

    def dense_boxes(self, outputs: Tensors, canvas: Canvas) -> Tensor:
        """Raises OptionError, as ``box_name``."""
        self._no_dense_boxes()

    def specs(self) -> Mapping[str, TensorSpec]:
        """See Detector.specs. The proposals are not in ``forward``'s outputs: they come from the two calls above."""
        classes, channels = self.spec.num_classes, self.backbone.stage_channels
        return {
            FEATURES: TensorSpec(Per.CELL, (self.spec.fpn_channels,)),
            RPN_LOGITS: TensorSpec(Per.ANCHOR, (1,)),
            RPN_DELTAS: TensorSpec(Per.ANCHOR, (4,)),
            **{name: TensorSpec(per_level(k), (channels[k],)) for k, name in enumerate(BACKBONE)},
            PROPOSAL_BOXES: TensorSpec(Per.PROPOSAL, (4,)),
            PROPOSAL_LOGITS: TensorSpec(Per.PROPOSAL, (classes + 1,)),
        }

    def _sample(
        self, listed: list[Tensor], targets: Targets, rule: SampleRule
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return sample_proposals(listed, targets, self.spec.num_classes, rule, own_boxes=self.recipe.own_boxes)

    def _proposals(self, outputs: Tensors, content: Tensor, canvas: Canvas, rule: ProposalRule) -> list[Tensor]:
        return find_proposals(outputs[RPN_LOGITS], outputs[RPN_DELTAS], self.recipe, content, canvas, rule)

    def _no_dense_boxes(self) -> NoReturn:
        raise OptionError(
            f"{self.spec.name} predicts boxes for its proposals, not for every anchor; methods that read features or "
            f"proposals work on it: `kdcli methods` lists them"
        )
