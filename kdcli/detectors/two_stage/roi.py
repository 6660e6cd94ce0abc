"""The second stage: features of each proposal (RoIAlign, arXiv 1703.06870), a small head on them, and its decoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.ops import batched_nms, roi_align

from kdcli.detectors.two_stage.proposals import clip
from kdcli.detectors.two_stage.recipes import BOX_STDS, TORCHVISION_POOLING, RoIPooling
from kdcli.geometry.boxes import decode_deltas
from kdcli.geometry.grid import Grid
from kdcli.structures import Canvas, Detections
from kdcli.tensors import precise

SIZE = 7  # cells of a proposal's features, each way
POOLED_LEVELS = 4  # P2..P5
CANONICAL_SIDE = 224  # pixels: a proposal of this side is read from P4, the third level (arXiv 1612.03144, eq. 1)
CANONICAL_LEVEL = 2
FINEST_SIDE = 56  # pixels: what mmdet counts the levels from, P2

SCORE_THRESHOLD = 0.05
NMS_IOU = 0.5
MAX_PER_IMAGE = 100


class RoIHead(nn.Module):
    """channels: C of the neck. width: of the linear layers. num_classes: K. convs: see TwoStageRecipe.roi_convs.

    Its K + 1 logits hold the background last, and there are no deltas for it; torchvision has it first, with deltas.
    """

    def __init__(self, channels: int, width: int, num_classes: int, convs: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.body: nn.Module = (
            FastRCNNConvFCHead((channels, SIZE, SIZE), [channels] * convs, [width], norm_layer=nn.BatchNorm2d)
            if convs
            else TwoMLPHead(channels * SIZE**2, width)
        )
        self.cls = nn.Linear(width, num_classes + 1)
        self.box = nn.Linear(width, num_classes * 4)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [R, K + 1] and deltas [R, K, 4] of ``pooled`` [R, C, 7, 7]."""
        x = self.body(pooled)
        return self.cls(x), self.box(x).reshape(-1, self.num_classes, 4)


def levels_of(boxes: Tensor, rule: RoIPooling = TORCHVISION_POOLING) -> Tensor:
    """The level, 0..3, that each of ``boxes`` [R, 4] is read from: [R] int64. arXiv 1612.03144, eq. 1; mmdet 3.3.0, as its
    SingleRoIExtractor does."""
    side = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
    if rule.levels == "finest":
        level = torch.floor(torch.log2(side / FINEST_SIDE + 1e-6))
    else:
        level = torch.floor(CANONICAL_LEVEL + torch.log2(side / CANONICAL_SIDE) + 1e-6)
    return level.clamp(0, POOLED_LEVELS - 1).long()


def pool(
    features: Tensor, boxes: list[Tensor], grid: Grid, canvas: Canvas, rule: RoIPooling = TORCHVISION_POOLING
) -> Tensor:
    """Features [sum R, C, 7, 7] of the boxes ([R, 4] of each image, xyxy canvas pixels); differentiable, in float32.

    RoIAlign refuses bf16 on a CPU. ``features`` [B, P, C].
    """
    image = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
    rois = torch.cat([image, torch.cat(boxes)], dim=1)
    level = levels_of(rois[:, 1:], rule)
    places, parts = [], []
    maps = grid.level_maps(precise(features), canvas, POOLED_LEVELS)
    rois = rois.to(maps[0])
    for k, (x, stride) in enumerate(zip(maps, grid.strides, strict=False)):
        place = torch.nonzero(level == k).squeeze(1)
        places.append(place)
        parts.append(
            roi_align(
                x, rois[place], SIZE, spatial_scale=1 / stride, sampling_ratio=rule.samples or -1, aligned=rule.aligned
            )
        )
    order = torch.cat(places).argsort()
    return torch.cat(parts).index_select(0, order)


@torch.no_grad()
def detect(logits: Tensor, deltas: Tensor, proposals: Tensor, content: Tensor, least_side: float) -> Detections:
    """Detections of one image, best first, clipped to ``content`` [2] (height, width): torchvision's and mmdet's rule.

    ``logits`` [R, K + 1], background last, ``deltas`` [R, K, 4], ``proposals`` [R, 4] xyxy canvas pixels. ``least_side``:
    a detection's, in pixels; 0: no matter.
    """
    scores = precise(logits).softmax(dim=-1)[:, :-1]
    proposal, label = torch.nonzero(scores > SCORE_THRESHOLD, as_tuple=True)
    boxes = clip(decode_deltas(proposals[proposal], precise(deltas)[proposal, label], BOX_STDS), content)
    score = scores[proposal, label]
    real = ((boxes[:, 2:] - boxes[:, :2]) >= least_side).all(dim=1)
    boxes, score, label = boxes[real], score[real], label[real]
    keep = batched_nms(boxes, score, label, NMS_IOU)[:MAX_PER_IMAGE]
    return Detections(boxes[keep], score[keep], label[keep])
