"""Feature pyramid network (FPN, arXiv 1612.03144): C3, C4, C5 to five maps of equal channels at strides 8 to 128.

P6 and P7 come from stride-2 convs (RetinaNet, arXiv 1708.02002); what P6 reads and whether P7 sees a relu differs from
detector to detector and is part of its recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class NeckSpec:
    """p6_from: ``p5`` (GFL, ATSS, FCOS) or ``c5`` (RetinaNet). relu_before_p7: FCOS and torchvision."""

    p6_from: Literal["p5", "c5"] = "p5"
    relu_before_p7: bool = False


class FPN(nn.Module):
    """in_channels: of C3, C4, C5. channels: of every output."""

    def __init__(self, in_channels: Sequence[int], channels: int, spec: NeckSpec) -> None:
        super().__init__()
        self.spec = spec
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        p6_channels = channels if spec.p6_from == "p5" else in_channels[-1]
        self.p6 = nn.Conv2d(p6_channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """P3..P7 of C3..C5: [B, channels, ceil(H / stride), ceil(W / stride)]; a stride-2 conv halves upwards."""
        inner = [conv(c) for conv, c in zip(self.lateral, maps, strict=True)]
        for k in range(len(inner) - 1, 0, -1):
            inner[k - 1] = inner[k - 1] + F.interpolate(inner[k], size=inner[k - 1].shape[-2:], mode="nearest")
        outputs = [conv(x) for conv, x in zip(self.output, inner, strict=True)]
        p6 = _halved(self.p6, outputs[-1] if self.spec.p6_from == "p5" else maps[-1])
        p7 = _halved(self.p7, F.relu(p6) if self.spec.relu_before_p7 else p6)
        return [*outputs, p6, p7]


def _halved(conv: nn.Module, x: Tensor) -> Tensor:
    """``conv(x)``, in float32 where a CPU's bf16 is wrong.

    PyTorch 2.14.1 on a CPU with AMX reads unwritten memory in the bf16 weight gradient of a stride-2 convolution whose
    input has width 1 (canvas sides of 64 px or less): nan, or values up to 1e37.
    """
    if x.device.type == "cpu" and x.shape[-1] == 1 and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            result: Tensor = conv(x.float())
            return result
    out: Tensor = conv(x)
    return out
