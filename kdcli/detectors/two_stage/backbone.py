"""A backbone that also gives C2, the map of stride 4, from which Faster R-CNN's finest level is made."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcli.detectors.backbones import Backbone


class FourStageBackbone(Backbone):
    """``stage_channels``: of C2, C3, C4, C5. Everything else is Backbone's."""

    def __init__(self, name: str, *, frozen: bool = False, stride_in_1x1: bool = False) -> None:
        super().__init__(name, frozen=frozen, stride_in_1x1=stride_in_1x1)
        self.eval()  # so that the running statistics do not see the zeros
        with torch.no_grad():
            finest = self.stages(torch.zeros(1, 3, 32, 32))[0]
        self.train()
        self.stage_channels = (finest.shape[1], *self.channels)

    def stages(self, images: Tensor) -> list[Tensor]:
        """C2..C5 of normalised ``images`` [B, 3, H, W]: [B, stage_channels[k], ceil(H / stride), ceil(W / stride)]."""
        maps = []
        x = images
        for run in self._runs:
            for path in run:
                x = self.get_submodule(path)(x)
            maps.append(x)
        return maps
