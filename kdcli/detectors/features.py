"""A teacher that gives feature maps and nothing else: backbone and FPN of a detector whose head kdcli does not have.

Methods that read maps alone (cwd, pkd, fgd, drkd, defeat without classes) can learn from it. `kdcli convert
--features-only` makes it from any detector of mmdet with a plain FPN; docs/decisions/0026-features-only.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from kdcli.detectors.backbones import Backbone
from kdcli.detectors.base import IMAGE_STD, MM_FEATURES, Detector, ModelSpec
from kdcli.detectors.neck import FPN, NeckSpec
from kdcli.errors import OptionError
from kdcli.geometry.assign import AssignerSpec
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec
from kdcli.structures import Canvas, Detections, Targets
from kdcli.tensors import BACKBONE, FEATURES, Per, Tensors, TensorSpec, flatten_levels, per_level

POOLED_STRIDES = (4, 8, 16, 32, 64)
STRIDES = (8, 16, 32, 64, 128)


class FeaturesDetector(Detector):
    """``spec``, whose ``neck`` says what makes the levels above C5's, with random weights; ``spec.bn`` is not ``auto``.

    ``pool``: strides 4 to 64, P6 every second cell of P5 (mmdet's two-stage detectors). ``on_output``, ``on_input``:
    strides 8 to 128, P6 a stride-2 convolution of P5 or of C5 and P7 one of P6, or of its relu with ``_relu`` behind the
    name (mmdet's ``add_extra_convs`` and ``relu_before_extra_convs``). The grid has one anchor a cell, which nothing
    reads.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.bn != "auto"
        self.spec = spec
        self.pooled = spec.neck == "pool"
        self.grid = Grid(strides=POOLED_STRIDES if self.pooled else STRIDES)
        self.assigner = AssignerSpec(kind="none")
        self.region_defaults = RegionSpec()
        self.register_buffer("mean", torch.tensor(spec.image_mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).reshape(3, 1, 1), persistent=False)
        self.backbone = Backbone(spec.backbone, bn=spec.bn, stride_in_1x1=spec.stride_in_1x1, dcn=spec.dcn)
        stages, channels = self.backbone.stage_channels, spec.fpn_channels
        self.neck: nn.Module
        if self.pooled:
            self.neck = FeaturePyramidNetwork(list(stages), channels, extra_blocks=LastLevelMaxPool())
        else:
            on_input, relu = spec.neck.startswith("on_input"), spec.neck.endswith("_relu")
            self.neck = FPN(stages[1:], channels, NeckSpec("c5" if on_input else "p5", relu))

    def forward(self, images: Tensor) -> Tensors:
        """See Detector.forward. The neck's maps, and the backbone's stages at their strides."""
        stages = self.backbone.stages(images.sub(self.mean).div_(self.std))
        named = dict(zip(BACKBONE, stages, strict=True))
        maps = list(self.neck(named).values()) if self.pooled else self.neck(stages[1:])
        views = {name: named[name].permute(0, 2, 3, 1).flatten(1, 2) for name in self._stages()}
        return {FEATURES: flatten_levels(maps, (self.spec.fpn_channels,)), **views}

    def specs(self) -> Mapping[str, TensorSpec]:
        """See Detector.specs."""
        channels = dict(zip(BACKBONE, self.backbone.stage_channels, strict=True))
        named = {n: TensorSpec(per_level(k), (channels[n],)) for k, n in enumerate(self._stages())}
        return {FEATURES: TensorSpec(Per.CELL, (self.spec.fpn_channels,)), **named}

    def loss(self, outputs: Tensors, targets: Targets) -> dict[str, Tensor]:
        """Raises OptionError."""
        self._no_head()

    def decode(self, outputs: Tensors, content: Tensor, canvas: Canvas) -> list[Detections]:
        """Raises OptionError."""
        self._no_head()

    @property
    def box_name(self) -> str:
        """Raises OptionError."""
        self._no_head()

    def decode_boxes(self, box_tensor: Tensor, index: Tensor, canvas: Canvas) -> Tensor:
        """Raises OptionError."""
        self._no_head()

    def dense_boxes(self, outputs: Tensors, canvas: Canvas) -> Tensor:
        """Raises OptionError."""
        self._no_head()

    def _stages(self) -> tuple[str, ...]:
        """The stages that have a level of the grid, finest first."""
        return BACKBONE if self.pooled else BACKBONE[1:]

    def _no_head(self) -> NoReturn:
        raise OptionError(without_head(self.spec.name))


def without_head(name: str) -> str:
    """What is said of the model ``name`` where a head would be needed."""
    return (
        f"{name} gives features only: it has no head to train or to detect with. It can teach methods that read "
        "feature maps (cwd, pkd, fgd, drkd, defeat)"
    )


def require_head(detector: Detector, where: str) -> None:
    """Raises OptionError when ``detector``, which comes from ``where``, has no head to detect with."""
    if detector.spec.detector == MM_FEATURES:
        raise OptionError(f"{where}: {without_head(detector.spec.name)}")
