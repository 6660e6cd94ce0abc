"""What a detector is: a map from images to named dense tensors, with its own loss, box coding and decoding.

``forward`` always returns tensors, never losses or detections, whatever the mode; it runs no NMS and needs no hooks.
Distillation methods therefore see a student and a teacher through the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from kdcli.errors import OptionError, nearest
from kdcli.geometry.assign import AssignerSpec
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec
from kdcli.geometry.spec import JsonSpec
from kdcli.structures import Canvas, Detections, Targets
from kdcli.tensors import Tensors, TensorSpec

BatchNormMode = Literal["auto", "train", "frozen"]


@dataclass(frozen=True)
class ModelSpec(JsonSpec):
    """Everything that is needed to build a detector again, before its weights. Raises OptionError on impossible values.

    detector, backbone: names in ``DETECTORS`` and ``BACKBONES``. num_classes: K, foreground classes.
    fpn_channels: C of the neck. tower_convs: 3x3 convs of each of the head's two towers. head_channels: their channels,
    None for fpn_channels. reg_max: E - 1 of a box distribution. bn: backbone batch norm: ``train`` (and nothing
    frozen), ``frozen`` (eval mode, stem and first stage fixed), ``auto`` = frozen with pretrained weights, else train;
    a built detector never says ``auto``.
    """

    detector: str
    backbone: str
    num_classes: int
    fpn_channels: int = 256
    tower_convs: int = 4
    head_channels: int | None = None
    reg_max: int = 16
    bn: BatchNormMode = "auto"

    def __post_init__(self) -> None:
        for name in ("detector", "backbone"):
            if not isinstance(getattr(self, name), str):
                raise OptionError(f"model.{name} = {getattr(self, name)!r}: must be a name")
        least = {"num_classes": 1, "fpn_channels": 1, "tower_convs": 0, "head_channels": 1, "reg_max": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if name == "head_channels" and value is None:
                continue
            if type(value) is not int or value < low:
                raise OptionError(f"model.{name} = {value!r}: must be a whole number of at least {low}")
        if self.bn not in get_args(BatchNormMode):
            raise OptionError(f"model.bn = {self.bn!r}{nearest(str(self.bn), get_args(BatchNormMode))}")

    @property
    def name(self) -> str:
        """``<detector>_<backbone>``, as ``--model`` takes it."""
        return f"{self.detector}_{self.backbone}"


class Detector(nn.Module):
    """Interface of all detectors.

    spec: how it was built. grid: cells and anchors, the index space of every ``[B, N, ...]`` tensor. assigner: which
    anchors are positive. region_defaults: the regions that distillation reads unless told otherwise.
    """

    spec: ModelSpec
    grid: Grid
    assigner: AssignerSpec
    region_defaults: RegionSpec

    def forward(self, images: Tensor) -> Tensors:
        """Named dense tensors of ``images`` [B, 3, H, W], RGB in 0..1; normalised inside. Names: ``specs()``."""
        raise NotImplementedError

    def loss(self, outputs: Tensors, targets: Targets) -> dict[str, Tensor]:
        """Scalar loss terms, already weighted; their sum is what to minimise. Zero with a graph for empty images."""
        raise NotImplementedError

    def decode(self, outputs: Tensors, content: Tensor, canvas: Canvas) -> list[Detections]:
        """Detections after NMS, clipped to ``content`` [B, 2] (height, width in canvas pixels); no gradient."""
        raise NotImplementedError

    @property
    def box_name(self) -> str:
        """Name of the tensor that ``decode_boxes`` reads: ``box_regression`` or ``box_distribution``."""
        raise NotImplementedError

    def decode_boxes(self, box_tensor: Tensor, index: Tensor, canvas: Canvas) -> Tensor:
        """Boxes [M, 4] (xyxy canvas pixels, float32, unclipped) of the anchors ``index`` [M], differentiable.

        ``box_tensor`` [M, ...] holds their rows of ``box_name``. Live, cached and student tensors all pass here.
        """
        raise NotImplementedError

    def dense_boxes(self, outputs: Tensors, canvas: Canvas) -> Tensor:
        """``boxes`` [B, N, 4]: ``decode_boxes`` of every anchor."""
        raise NotImplementedError

    def specs(self) -> Mapping[str, TensorSpec]:
        """What ``forward`` returns: name -> rows and trailing dims."""
        raise NotImplementedError


def count_parameters(module: nn.Module, *, trainable: bool = False) -> int:
    """Number of parameters of ``module``; with ``trainable``, of those that an optimiser would change."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)
