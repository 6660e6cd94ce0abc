"""What makes the one dense head a GFL, a RetinaNet, an ATSS or an FCOS: grid, assigner, box coding, loss, norm, neck.

Numbers are mmdet 3.3.0's. A further detector is one more constant here, plus its loss. LD (arXiv 2102.12252) needs a box
distribution: ``with_distribution`` gives it to every recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from kdcli.detectors.base import ModelSpec
from kdcli.detectors.dense.head import Activation, Norm, Tower
from kdcli.detectors.dense.losses import ATSS_STDS, Overlap, atss_loss, fcos_loss, gfl_loss, retinanet_loss
from kdcli.detectors.neck import NeckSpec
from kdcli.errors import OptionError
from kdcli.geometry.assign import AssignerSpec
from kdcli.geometry.boxes import aligned_ciou, aligned_giou
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec
from kdcli.structures import Targets
from kdcli.tensors import BOX_DISTRIBUTION, BOX_REGRESSION, CENTERNESS, CLS_LOGITS, Tensors

BoxCoding = Literal["distribution", "delta", "distance"]
LossFunction = Callable[[Tensors, Targets, Grid], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """grid, assigner, regions: see geometry. box: ``distribution`` = [4, E] edge logits in strides; ``delta`` = offsets
    from the anchor in the coding of R-CNN, divided by ``box_stds``; ``distance`` = left, top, right, bottom in strides
    from the cell's centre. loss: outputs, targets, grid -> weighted terms. norm, tower_bias, activation, centerness: see
    DenseHead. scaled: a learnt factor per level on the box prediction. nms_iou: class-aware NMS. giou: loss_bbox is 1 -
    GIoU, and ``loss`` takes another ``overlap`` in its place. family: whose defaults the methods take; ``replace`` keeps
    it; empty: the recipe's own name.
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
    tower_bias: bool = False
    scaled: bool = False
    activation: Activation = "none"
    centerness: Tower | None = None
    box_stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    giou: bool = False
    family: str = ""


def with_distribution(recipe: Recipe) -> Recipe:
    """``recipe`` with edge logits for its box branch, as LD's repository has it, and nothing else changed: its losses
    decode either form. GFL is itself."""
    return replace(recipe, box="distribution", activation="none", giou=recipe.giou or recipe.box == "delta")


def with_ciou(recipe: Recipe) -> Recipe:
    """``recipe`` with CIoU (arXiv 1911.08287) where its loss_bbox has GIoU, as LD's configurations for PASCAL VOC have it.

    Raises OptionError on a recipe whose box loss is no overlap: RetinaNet's L1, the -log IoU of the first FCOS.
    """
    if not recipe.giou:
        raise OptionError(
            f"model.box_loss = 'ciou': the box loss of {recipe.name} is no GIoU that it could replace; leave it out"
        )
    loss: Any = recipe.loss  # one with ``giou`` takes an overlap
    return replace(recipe, loss=partial(loss, overlap=aligned_ciou))


def with_options(recipe: Recipe, spec: ModelSpec) -> Recipe:
    """``recipe`` with the box branch and the box loss of ``spec``. Raises OptionError where they do not go together."""
    if spec.box == "distribution":
        recipe = with_distribution(recipe)
    return with_ciou(recipe) if spec.box_loss == "ciou" else recipe


def _box(outputs: Tensors) -> Tensor:
    return outputs[BOX_DISTRIBUTION] if BOX_DISTRIBUTION in outputs else outputs[BOX_REGRESSION]


def _gfl(outputs: Tensors, targets: Targets, grid: Grid, *, overlap: Overlap = aligned_giou) -> dict[str, Tensor]:
    return gfl_loss(outputs[CLS_LOGITS], outputs[BOX_DISTRIBUTION], targets, grid, overlap=overlap)


def _retinanet(outputs: Tensors, targets: Targets, grid: Grid, *, overlap: Overlap = aligned_giou) -> dict[str, Tensor]:
    return retinanet_loss(outputs[CLS_LOGITS], _box(outputs), targets, grid, overlap=overlap)


def _atss(outputs: Tensors, targets: Targets, grid: Grid, *, overlap: Overlap = aligned_giou) -> dict[str, Tensor]:
    return atss_loss(outputs[CLS_LOGITS], _box(outputs), outputs[CENTERNESS], targets, grid, overlap=overlap)


def _fcos(
    outputs: Tensors, targets: Targets, grid: Grid, *, log_iou: bool = False, overlap: Overlap = aligned_giou
) -> dict[str, Tensor]:
    cls_logits, centerness = outputs[CLS_LOGITS], outputs[CENTERNESS]
    return fcos_loss(cls_logits, _box(outputs), centerness, targets, grid, log_iou=log_iou, overlap=overlap)


# Generalized Focal Loss, arXiv 2006.04388.
GFL = Recipe(
    name="gfl",
    family="gfl",
    grid=Grid(base_scale=8.0),
    assigner=AssignerSpec(kind="atss", topk=9),
    box="distribution",
    loss=_gfl,
    giou=True,
    norm="group",
    neck=NeckSpec(p6_from="p5"),
    nms_iou=0.6,
    regions=RegionSpec(),
    scaled=True,
)

# RetinaNet, arXiv 1708.02002: anchors of three sizes an octave and three ratios.
RETINANET = Recipe(
    name="retinanet",
    family="retinanet",
    grid=Grid(base_scale=4.0, scales=(1.0, 2 ** (1 / 3), 2 ** (2 / 3)), ratios=(0.5, 1.0, 2.0)),
    assigner=AssignerSpec(kind="max_iou", pos_iou=0.5, neg_iou=0.4, min_pos_iou=0.0),
    box="delta",
    loss=_retinanet,
    norm="none",
    neck=NeckSpec(p6_from="c5"),
    nms_iou=0.5,
    regions=RegionSpec(vlr_keep_positives=False),  # as LD's repository does for RetinaNet alone
)

# Adaptive Training Sample Selection, arXiv 1912.02424: GFL's grid and assigner.
ATSS = replace(GFL, name="atss", family="atss", box="delta", loss=_atss, centerness="box", box_stds=ATSS_STDS)

# FCOS, arXiv 1904.01355, with the improvements that its authors added later (centre sampling, distances normalised by
# the stride, centerness on the box tower, GIoU): what field practice calls FCOS, 38.7 against 36.6 AP in mmdet's tables.
FCOS = Recipe(
    name="fcos",
    family="fcos",
    grid=Grid(offset=0.5),
    assigner=AssignerSpec(kind="fcos", center_radius=1.5),
    box="distance",
    loss=_fcos,
    giou=True,
    norm="group",
    neck=NeckSpec(p6_from="p5", relu_before_p7=True),
    nms_iou=0.6,
    regions=RegionSpec(vlr_metric="inside", vlr_keep_positives=False),  # background points inside a box
    tower_bias=True,
    scaled=True,
    activation="relu",
    centerness="box",
)

# FCOS as in the paper's first version.
FCOS_PLAIN = replace(
    FCOS,
    assigner=AssignerSpec(kind="fcos"),
    loss=partial(_fcos, log_iou=True),
    giou=False,
    nms_iou=0.5,
    tower_bias=False,
    activation="exp",
    centerness="cls",
)
