"""Deformable convolutions (arXiv 1703.06211; v2, with a mask, 1811.11168) as conv2 of a ResNet's bottlenecks.

As mmdet's ResNet has them with ``dcn=dict(type='DCN'|'DCNv2', deform_groups=1)`` and ``stage_with_dcn=(False, True, True,
True)``: every block of the stages behind C2. Modules have mmdet's names, ``conv2.weight`` and ``conv2.conv_offset``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import deform_conv2d

from kdcli.detectors.base import Dcn
from kdcli.errors import OptionError
from kdcli.tensors import precise

STAGES = ("layer2", "layer3", "layer4")
POINTS = 9  # of a 3x3 kernel
PER_POINT = {"v1": 2, "v2": 3}  # numbers that conv_offset gives for a point of the kernel: (y, x), and with v2 a mask


class DeformableConv(nn.Module):
    """``conv``, of 3x3 with padding 1 and without a bias, whose points are shifted by what ``conv_offset`` reads of the input.

    conv_offset's channels: y and x of each point of the kernel in turn, in cells of the input, row by row; v2: then a
    mask of each, before its sigmoid (mmcv 2.1.0's DeformConv2dPack and ModulatedDeformConv2dPack). It starts at 0, so
    that v1 begins as ``conv`` and v2 as half of it; ``weight`` is that of ``conv``.
    """

    def __init__(self, conv: nn.Conv2d, version: Dcn) -> None:
        super().__init__()
        assert (conv.kernel_size, conv.padding, conv.dilation, conv.bias) == ((3, 3), (1, 1), (1, 1), None)
        self.stride = conv.stride[0]
        self.weight = conv.weight
        self.conv_offset = nn.Conv2d(conv.in_channels, PER_POINT[version] * POINTS, 3, self.stride, 1)
        nn.init.zeros_(self.conv_offset.weight)
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] as a convolution gives it. In float32 at least: torchvision's operator has no bf16 on a CPU, and
        an offset of 10 cells in bf16 is off by up to 0.03."""
        device = "cpu" if x.is_meta else x.device.type  # shapes alone: there is no autocast of meta
        with torch.autocast(device, enabled=False):
            x = precise(x)
            found = self.conv_offset(x)
            offset, mask = found[:, : 2 * POINTS], found[:, 2 * POINTS :]
            weights = mask.sigmoid() if mask.shape[1] else None
            out: Tensor = deform_conv2d(x, offset, self.weight, stride=self.stride, padding=1, mask=weights)
        return out


def use_deformable(model: nn.Module, name: str, version: Dcn) -> None:
    """Put deformable convolutions into ``model``, a ResNet of torchvision. Raises OptionError on one without
    bottlenecks."""
    blocks = [m for stage in STAGES for m in getattr(model, stage, nn.Module()).modules() if isinstance(m, Bottleneck)]
    if not blocks:
        raise OptionError(f"model.dcn = '{version}': backbone {name} has no bottlenecks; leave it out")
    for block in blocks:
        block.conv2 = DeformableConv(block.conv2, version)
