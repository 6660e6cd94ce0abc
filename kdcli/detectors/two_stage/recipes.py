"""The numbers of Faster R-CNN (arXiv 1506.01497 with the FPN of 1612.03144), which are torchvision's, and its variants.

Anchors are matched in the loss (``matching.py``), so nothing is assigned in the data workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdcli.geometry.assign import TIE, AssignerSpec
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
MMDET_TRAINING = ProposalRule(before=2000, after=1000)
TESTING = ProposalRule(before=1000, after=1000)
DISTILLATION = ProposalRule(before=2000, after=1000)  # DeFeat (arXiv 2103.14475): mmdet's training proposals


@dataclass(frozen=True)
class RoIPooling:
    """How RoIAlign (arXiv 1703.06870) samples. samples: points a cell, each way; 0: as many as the cell has pixels of the
    map. aligned: half a pixel further to the top left, where the corner of a box lies on the map. levels: whether a box's
    level is counted from P4 at 224 pixels (``canonical``, torchvision) or from P2 at 56 (``finest``, mmdet's
    finest_scale); they differ in where 1e-6 is added: to the level or to the ratio of the sides.
    """

    samples: int
    aligned: bool
    levels: Literal["canonical", "finest"]


TORCHVISION_POOLING = RoIPooling(samples=2, aligned=False, levels="canonical")
MMDET_POOLING = RoIPooling(samples=0, aligned=True, levels="finest")


@dataclass(frozen=True)
class LowQuality:
    """The anchors that a box gets though they overlap it less than 0.7: those whose IoU with it is its highest.

    min_iou: none for a box whose highest IoU is below it; mmdet's min_pos_iou. claimed: they train for this box (the last
    one in a conflict), as in mmdet; otherwise for the box that they overlap most, as in torchvision. tie: IoUs this close to
    the highest are as high. 0: where a box's IoU with several anchors is one number but for rounding, as inside or around
    them, rounding chooses some of them, as in mmdet.
    """

    min_iou: float
    claimed: bool
    tie: float


TORCHVISION_LOW_QUALITY = LowQuality(min_iou=0.0, claimed=False, tie=TIE)
MMDET_LOW_QUALITY = LowQuality(min_iou=0.3, claimed=True, tie=0.0)


@dataclass(frozen=True, kw_only=True)
class TwoStageRecipe:
    """rpn_convs: 3x3 convs before the RPN's predictions. roi_convs: 3x3 convs with batch norm before a single linear
    layer in the RoI head; 0: two linear layers and no conv. neck_norm: batch norm after each conv of the neck. pooling:
    of the proposals' features.

    training: its proposals. low_quality: of the RPN's matching. smooth_l1_beta: where the box losses turn from square to
    linear; 0: L1. count_missing: the RPN's divisor counts one sample for an image that has no positive (or no
    background) one. own_boxes: a ground-truth box among the proposals has its own label even where another one is equal.
    proposal_side, detection_side: the least side in pixels, after clipping; 0 leaves only what has an area among the
    proposals, and everything among the detections. mmdet_init: how neck and RoI head start, see ``initialise.py``. lr:
    ``optim.lr`` where the user names none, for 16 images a step.
    """

    name: str
    grid: Grid
    assigner: AssignerSpec
    rpn_convs: int = 1
    roi_convs: int = 0
    neck_norm: bool = False
    pooling: RoIPooling = TORCHVISION_POOLING
    training: ProposalRule = TRAINING
    low_quality: LowQuality = TORCHVISION_LOW_QUALITY
    smooth_l1_beta: float = 1 / 9
    count_missing: bool = False
    own_boxes: bool = False
    proposal_side: float = 1e-3
    detection_side: float = 1e-2
    mmdet_init: bool = False
    lr: float = 0.01
    family: str = ""  # as for Recipe


FASTER_RCNN = TwoStageRecipe(
    name="faster_rcnn",
    family="faster_rcnn",
    grid=Grid(strides=STRIDES, base_scale=ANCHOR_SCALE, ratios=RATIOS),
    assigner=AssignerSpec(kind="none"),
)
