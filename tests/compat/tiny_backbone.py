"""A backbone of 1,900 weights, so that checkpoints and resumable states fit into the repository.

The smallest of kdcli's own has 340,000: its checkpoint, and the state of a run with momentum, would be 2 MB here.
"""

from __future__ import annotations

import pytest
import torchvision
from torch import Tensor, nn

from kdcli.detectors.backbones import BACKBONES, Layout

NAME = "tiny"
LAYOUT = Layout((("stem",), ("c3",), ("c4",), ("c5",)))


def _halves(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class Tiny(nn.Module):
    """Strides 4 to 32 in five convolutions, each of which halves the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_halves(3, 6), _halves(6, 6))
        self.c3, self.c4, self.c5 = _halves(6, 6), _halves(6, 8), _halves(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        """C5 of ``images`` [B, 3, H, W]: [B, 8, H / 32, W / 32]."""
        return self.c5(self.c4(self.c3(self.stem(images))))  # type: ignore[no-any-return]


def install(patch: pytest.MonkeyPatch) -> None:
    """Make ``--model gfl_tiny`` possible until ``patch`` is undone."""
    others = torchvision.models.get_model
    patch.setattr(torchvision.models, "get_model", lambda name, **kw: Tiny() if name == NAME else others(name, **kw))
    patch.setitem(BACKBONES, NAME, LAYOUT)
