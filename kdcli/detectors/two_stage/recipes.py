"""The numbers of Faster R-CNN (arXiv 1506.01497 with the FPN of 1612.03144), which are torchvision's, and its variants.

Anchors are matched in the loss (``matching.py``), so nothing is assigned in the data workers.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdcli.geometry.assign import AssignerSpec
from kdcli.geometry.grid import Grid

STRIDES = (4, 8, 16, 32, 64)  # P2..P6
ANCHOR_SCALE = 8.0  # one size a level, 32 to 512 pixels
RATIOS = (0.5, 1.0, 2.0)
BOX_STDS = (0.1, 0.1, 0.2, 0.2)  # of the RoI head's deltas; torchvision says weights 10, 10, 5, 5
RPN_STDS = (1.0, 1.0, 1.0, 1.0)
ROI_WIDTH = 1024  # of the RoI head's linear layers where ModelSpec.head_channels is None


@dataclass(frozen=True)
class ProposalRule:
    """Which boxes of the RPN become proposals: the best ``before`` of each level, then NMS, then the best ``after``."""

    before: int
    after: int


TRAINING = ProposalRule(before=2000, after=2000)
TESTING = ProposalRule(before=1000, after=1000)
DISTILLATION = ProposalRule(before=2000, after=1000)  # DeFeat (arXiv 2103.14475): mmdet's training proposals


@dataclass(frozen=True)
class RoIPooling:
    """How RoIAlign (arXiv 1703.06870) samples. samples: points a cell, each way; 0: as many as the cell has pixels of the
    map. aligned: half a pixel further to the top left, where the corner of a box lies on the map.
    """

    samples: int
    aligned: bool


TORCHVISION_POOLING = RoIPooling(samples=2, aligned=False)
MMDET_POOLING = RoIPooling(samples=0, aligned=True)


@dataclass(frozen=True, kw_only=True)
class TwoStageRecipe:
    """rpn_convs: 3x3 convs before the RPN's predictions. roi_convs: 3x3 convs with batch norm before a single linear
    layer in the RoI head; 0: two linear layers and no conv. neck_norm: batch norm after each conv of the neck. pooling:
    of the proposals' features.
    """

    name: str
    grid: Grid
    assigner: AssignerSpec
    rpn_convs: int = 1
    roi_convs: int = 0
    neck_norm: bool = False
    pooling: RoIPooling = TORCHVISION_POOLING
    family: str = ""  # as for Recipe


FASTER_RCNN = TwoStageRecipe(
    name="faster_rcnn",
    family="faster_rcnn",
    grid=Grid(strides=STRIDES, base_scale=ANCHOR_SCALE, ratios=RATIOS),
    assigner=AssignerSpec(kind="none"),
)
