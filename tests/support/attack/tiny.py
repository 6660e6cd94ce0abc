"""A detector of 3,000 weights, so that a training takes a second and a checkpoint 20 kB."""

from __future__ import annotations

from itertools import pairwise

import torch
import torchvision
from torch import Tensor, nn

from kdcli.detectors.backbones import BACKBONES, Layout

NAME = "tiny"
MODEL = ["--model", f"gfl_{NAME}", "--set", "model.fpn_channels=4", "--set", "model.tower_convs=1"]


class Tiny(nn.Module):
    """Strides 4 to 32 by five convolutions, each of which halves the image."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [3, 6, 6, 6, 8, 8]
        halves = [
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(sizes)
        ]
        self.stem = nn.Sequential(*halves[:2])
        self.c3, self.c4, self.c5 = halves[2:]

    def forward(self, images: Tensor) -> Tensor:
        """C5 of ``images`` [B, 3, H, W]: [B, 8, H / 32, W / 32]."""
        return self.c5(self.c4(self.c3(self.stem(images))))  # type: ignore[no-any-return]


def install() -> None:
    """Make ``--model gfl_tiny`` possible in this process and its children."""
    others = torchvision.models.get_model
    torchvision.models.get_model = lambda name, **kw: Tiny() if name == NAME else others(name, **kw)
    BACKBONES[NAME] = Layout((("stem",), ("c3",), ("c4",), ("c5",)))


def enlarge_head(checkpoint: dict[str, Tensor]) -> None:
    """Weights whose head is so large that its outputs differ between cells; in place."""
    for name, value in checkpoint.items():
        if name.startswith("head") and value.ndim > 1 and torch.is_floating_point(value):
            value.mul_(25.0)
