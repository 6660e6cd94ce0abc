"""What makes the one dense head a GFL or a RetinaNet: grid, assigner, box coding, loss, norm, neck and NMS threshold.

Numbers are mmdet 3.3.0's. A further detector (ATSS, FCOS) is one more constant here, plus its loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kdcli.detectors.dense.head import Norm
from kdcli.detectors.dense.losses import gfl_loss, retinanet_loss
from kdcli.detectors.neck import NeckSpec
from kdcli.geometry.assign import AssignerSpec
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec
from kdcli.structures import Targets
from kdcli.tensors import BOX_DISTRIBUTION, BOX_REGRESSION, CLS_LOGITS, Tensors

BoxCoding = Literal["distribution", "delta"]
LossFunction = Callable[[Tensors, Targets, Grid], dict[str, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """grid, assigner, regions: see geometry. box: ``distribution`` = [4, E] edge logits in strides; ``delta`` = offsets
    from the anchor in the coding of R-CNN, divided by ``box_stds``. loss: outputs, targets, grid -> weighted terms.
    norm: of the head's towers. scaled: a learnt factor per level on the box prediction. nms_iou: class-aware NMS.
    """

    name: str
    grid: Grid
    assigner: AssignerSpec
    box: BoxCoding
    loss: LossFunction
    norm: Norm
    neck: NeckSpec
    nms_iou: float
    regions: RegionSpec
    scaled: bool = False
    centerness: bool = False
    box_stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)


def _gfl(outputs: Tensors, targets: Targets, grid: Grid) -> dict[str, Tensor]:
    return gfl_loss(outputs[CLS_LOGITS], outputs[BOX_DISTRIBUTION], targets, grid)


def _retinanet(outputs: Tensors, targets: Targets, grid: Grid) -> dict[str, Tensor]:
    return retinanet_loss(outputs[CLS_LOGITS], outputs[BOX_REGRESSION], targets, grid)


# Generalized Focal Loss, arXiv 2006.04388.
GFL = Recipe(
    name="gfl",
    grid=Grid(base_scale=8.0),
    assigner=AssignerSpec(kind="atss", topk=9),
    box="distribution",
    loss=_gfl,
    norm="group",
    neck=NeckSpec(p6_from="p5"),
    nms_iou=0.6,
    regions=RegionSpec(),
    scaled=True,
)

# RetinaNet, arXiv 1708.02002: anchors of three sizes an octave and three ratios.
RETINANET = Recipe(
    name="retinanet",
    grid=Grid(base_scale=4.0, scales=(1.0, 2 ** (1 / 3), 2 ** (2 / 3)), ratios=(0.5, 1.0, 2.0)),
    assigner=AssignerSpec(kind="max_iou", pos_iou=0.5, neg_iou=0.4, min_pos_iou=0.0),
    box="delta",
    loss=_retinanet,
    norm="none",
    neck=NeckSpec(p6_from="c5"),
    nms_iou=0.5,
    regions=RegionSpec(vlr_keep_positives=False),  # as LD's repository does for RetinaNet alone
)
