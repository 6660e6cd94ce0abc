"""GloRe: global reasoning over a neck map (CVPR 2019, arXiv 1811.12814), in the form that DRKD uses (arXiv 2302.05637).

Cells are projected to a few nodes, the nodes exchange what they know through a graph convolution, and the result is
projected back onto the cells. On [B, cells, C] its 1x1 convolutions are linear maps of the last dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdcli.methods.reduce import world_moments


class GloRe(nn.Module):
    """Global reasoning unit: [B, cells, C] -> [B, cells, C].

    ``nodes`` is the number of graph nodes (C2 of DRKD); a node's state has twice as many numbers (C1). At C = 256 it has
    103,168 parameters with 64 nodes and 656,896 with 256.
    """

    def __init__(self, channels: int, nodes: int) -> None:
        super().__init__()
        states = 2 * nodes
        self.state = nn.Linear(channels, states)
        self.project = nn.Linear(channels, nodes)
        self.mix_nodes = nn.Linear(nodes, nodes)
        self.mix_states = nn.Linear(states, states, bias=False)
        self.extend = nn.Linear(states, channels, bias=False)
        self.norm = WorldBatchNorm(channels)

    def forward(self, value: Tensor) -> Tensor:
        """``value`` plus what the graph adds to each cell. The sum over the cells is not divided by their number."""
        projection = self.project(value)  # [B, cells, nodes]
        graph = self.state(value).mT @ projection  # [B, states, nodes]
        mixed = self.mix_states((self.mix_nodes(graph) + graph).relu().mT)  # [B, nodes, states]
        added: Tensor = self.norm(self.extend(projection @ mixed))
        return value + added


class WorldBatchNorm(nn.Module):
    """Batch norm by the statistics of the global batch, for modules that exist in training alone: no running averages.

    Unlike torch's it accepts a single cell (level P7 of one small image), which becomes its bias, and 1 and N processes
    agree. eps is that of DRKD's code.
    """

    def __init__(self, channels: int, eps: float = 1e-4) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, value: Tensor) -> Tensor:
        """[B, cells, C] -> the same shape; every cell counts."""
        mean, variance, _ = world_moments(value, value.new_ones(*value.shape[:2], 1))
        return (value - mean) * ((variance + self.eps).rsqrt() * self.weight) + self.bias
