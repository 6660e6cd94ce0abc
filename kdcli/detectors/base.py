"""What a detector is: a map from images to named dense tensors, with its own loss, box coding and decoding.

``forward`` always returns tensors, never losses or detections, whatever the mode; it runs no NMS and needs no hooks.
Distillation methods therefore see a student and a teacher through the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from kdcli.errors import OptionError, did_you_mean
from kdcli.geometry.assign import AssignerSpec
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec
from kdcli.geometry.spec import JsonSpec
from kdcli.limits import MAX_PARAMETERS, MODEL_COUNTS
from kdcli.shown import shown, word_of
from kdcli.structures import Canvas, Detections, Targets
from kdcli.tensors import Tensors, TensorSpec

BatchNormMode = Literal["auto", "train", "norm_eval", "frozen", "sync"]
BoxBranch = Literal["default", "distribution"]
BoxLoss = Literal["default", "ciou"]
FcosVariant = Literal["normalised", "plain"]
Dcn = Literal["none", "v1", "v2"]
FeatureNeck = Literal["default", "pool", "on_output", "on_output_relu", "on_input", "on_input_relu"]

MM_FEATURES = "mm_features"  # the detector without a head; see kdcli/detectors/features.py

IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in 0..1: what every torchvision backbone was trained with
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelSpec(JsonSpec):
    """Everything that is needed to build a detector again, before its weights. Raises OptionError on impossible values.

    detector, backbone: names in ``DETECTORS`` and ``BACKBONES``. num_classes: K, foreground classes.
    fpn_channels: C of the neck. tower_convs: 3x3 convs of each of the head's two towers. head_channels: their channels,
    None for fpn_channels (of Faster R-CNN's two linear layers: None for 1024). reg_max: E - 1 of a box distribution. bn:
    backbone batch norm: ``train`` (and nothing frozen), ``sync`` (train, with the statistics of all processes),
    ``norm_eval`` (statistics fixed everywhere, stem and first stage whole: mmdet's ``norm_eval=True, frozen_stages=1``),
    ``frozen`` (norm_eval, with scale and shift fixed too), ``auto`` = norm_eval with pretrained weights, else train; a
    built detector never says ``auto``. box: ``distribution`` gives any dense detector the edge logits that LD needs.
    box_loss: ``ciou`` puts CIoU in the place of a dense detector's GIoU.
    fcos: which of the two FCOS recipes; other detectors take the default alone. dcn: deformable convolutions in the
    bottlenecks of a ResNet behind C2, ``v2`` with a mask: mmdet's DCN and DCNv2. neck: of ``mm_features`` alone, see
    FeaturesDetector. image_mean, stride_in_1x1: of converted weights that were trained otherwise: the mean of RGB in 0..1
    that is taken off an image; the stride of a bottleneck in its first conv (Caffe's ResNets), not in its second.
    """

    detector: str
    backbone: str
    num_classes: int
    fpn_channels: int = 256
    tower_convs: int = 4
    head_channels: int | None = None
    reg_max: int = 16
    bn: BatchNormMode = "auto"
    box: BoxBranch = "default"
    box_loss: BoxLoss = "default"
    fcos: FcosVariant = "normalised"
    dcn: Dcn = "none"
    neck: FeatureNeck = "default"
    image_mean: tuple[float, ...] = IMAGE_MEAN
    stride_in_1x1: bool = False

    def __post_init__(self) -> None:
        for name in ("detector", "backbone"):
            if not isinstance(getattr(self, name), str):
                raise OptionError(f"model.{name} = {shown(getattr(self, name))}: must be a name")
        for name, (low, high) in MODEL_COUNTS.items():
            value = getattr(self, name)
            if name == "head_channels" and value is None:
                continue
            if type(value) is not int or not low <= value <= high:
                wanted = f"at least {low}" if type(value) is not int or value < low else f"at most {high:,}"
                raise OptionError(f"model.{name} = {shown(value)}: must be a whole number of {wanted}")
        if self.head_size() > MAX_PARAMETERS:
            raise OptionError(
                f"neck and head of fpn_channels = {self.fpn_channels}, head_channels = {self.head_channels}, tower_convs = "
                f"{self.tower_convs} and {self.num_classes} classes have about {self.head_size() / 1e9:.1f} billion "
                f"parameters; at most {MAX_PARAMETERS / 1e9:g} billion"
            )
        for name, hint in (
            ("bn", BatchNormMode),
            ("box", BoxBranch),
            ("box_loss", BoxLoss),
            ("fcos", FcosVariant),
            ("dcn", Dcn),
            ("neck", FeatureNeck),
        ):
            value, choices = getattr(self, name), get_args(hint)
            if value not in choices:
                raise OptionError(f"model.{name} = {shown(value)}{did_you_mean(word_of(value), choices)}")
        if len(self.image_mean) != 3 or not all(type(v) is float and 0 <= v <= 1 for v in self.image_mean):
            raise OptionError(f"model.image_mean = {self.image_mean!r}: must be three numbers in 0..1")
        if type(self.stride_in_1x1) is not bool:
            raise OptionError(f"model.stride_in_1x1 = {self.stride_in_1x1!r}: must be true or false")
        if self.fcos != "normalised" and self.detector != "fcos":
            raise OptionError(f"model.fcos = {self.fcos!r}: the model is {self.detector}; leave it out or take fcos_*")
        if (self.neck == "default") is (self.detector == MM_FEATURES):
            fix = "name another one" if self.neck == "default" else f"it is of {MM_FEATURES} alone, leave it out"
            raise OptionError(f"model.neck = {self.neck!r}: the model is {self.detector}; {fix}")

    def head_size(self) -> int:
        """About as many parameters as neck and head have, so that nothing is made of absurd numbers."""
        neck, head = self.fpn_channels, self.head_channels or self.fpn_channels
        outputs = self.num_classes + 4 * (self.reg_max + 1)
        return 9 * (
            8 * neck**2 + neck * head * min(1, self.tower_convs) + 2 * self.tower_convs * head**2 + head * outputs
        )

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

    def proposals(self, outputs: Tensors, content: Tensor, canvas: Canvas) -> list[Tensor]:
        """Boxes [R, 4] of each image that a two-stage detector looks at more closely, best first; no gradient."""
        raise NotImplementedError

    def proposal_logits(self, outputs: Tensors, boxes: list[Tensor], canvas: Canvas) -> Tensor:
        """RoI logits [sum R, K + 1] (background last) of ``boxes``, [R, 4] for each image."""
        raise NotImplementedError

    def sample_proposals(self, boxes: list[Tensor], targets: Targets) -> tuple[list[Tensor], Tensor]:
        """What a training step would sample from ``boxes`` ([R, 4] each, ground truth included), drawn from
        ``targets.draws``: (indices into each image's list, labels [sum S], K = background)."""
        raise NotImplementedError

    def specs(self) -> Mapping[str, TensorSpec]:
        """What ``forward`` returns: name -> rows and trailing dims."""
        raise NotImplementedError


def count_parameters(module: nn.Module, *, trainable: bool = False) -> int:
    """Number of parameters of ``module``; with ``trainable``, of those that an optimiser would change."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)
