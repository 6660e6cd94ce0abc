"""Relations between the ground-truth boxes of an image, as DRKD models them (IJCAI 2023, arXiv 2302.05637).

An attention block over the boxes: each box's feature takes up what the others know. Boxes of different images never see
each other.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from kdcli.methods.maps import MASKED, image_of

Filter = Literal["gate", "none", "random_official"]

GATE_WIDTH = 64  # of the learned gate's projections
GATE_BIAS = 2.0  # sigmoid(2) = 0.88: the gate starts nearly open


class RelationBlock(nn.Module):
    """Attention over the boxes of an image, with a residual: [S, D] -> [S, D], S boxes of all images of the batch.

    ``width``: D, 9 cells of C channels; at D = 2304 10,622,592 parameters without the filter. The logits are plain dot
    products, not divided by sqrt(D), as in the code. ``relation_filter`` multiplies the logits: ``gate`` by a learned
    sigmoid(u_i . v_j / 8 + 2); ``none`` by 1; ``random_official`` as the code does, by the softmax of a linear map that
    is drawn anew in each step and never learned. ``salt`` tells the draws of several blocks apart.
    """

    def __init__(self, width: int, relation_filter: Filter = "gate", salt: int = 0) -> None:
        super().__init__()
        self.relation_filter, self.salt = relation_filter, salt
        inner = width // 2
        self.query, self.key = nn.Linear(width, inner), nn.Linear(width, inner)
        self.value, self.out = nn.Linear(width, inner), nn.Linear(inner, width)
        if relation_filter == "gate":
            self.gate_query, self.gate_key = nn.Linear(width, GATE_WIDTH), nn.Linear(width, GATE_WIDTH)

    def forward(self, regions: Tensor, counts: list[int], draws: Tensor | None) -> Tensor:
        """``regions`` [S, D], sorted by image; ``counts``: boxes of each image; ``draws`` [B]: a seed for each image,
        read by ``random_official`` alone."""
        image = image_of(counts, regions.device)
        same = image[:, None] == image[None]  # every box sees at least itself
        logits = self.query(regions) @ self.key(regions).mT  # [S, S]
        if self.relation_filter == "gate":
            logits = logits * self._gate(regions)
        elif self.relation_filter == "random_official":
            assert draws is not None  # the training loop sets them
            logits = logits * random_filter(regions, same, counts, draws, self.salt)
        attention = logits.masked_fill(~same, MASKED).softmax(dim=-1)
        added: Tensor = self.out(attention @ self.value(regions))
        return regions + added

    def _gate(self, regions: Tensor) -> Tensor:
        product: Tensor = self.gate_query(regions) @ self.gate_key(regions).mT
        return (product / math.sqrt(GATE_WIDTH) + GATE_BIAS).sigmoid()


def random_filter(regions: Tensor, same: Tensor, counts: list[int], draws: Tensor, salt: int) -> Tensor:
    """What DRKD's code multiplies the logits by: [S, S], about 1/n in an image of n boxes, 0 between images.

    A linear map with torch's default range of +-1/sqrt(D), drawn on the CPU from ``draws`` [B], so that the numbers are
    those of the image and the epoch on any device and in any batch.
    """
    width = regions.shape[1]
    columns = [regions.new_zeros(width + 1, 0)]
    for count, draw in zip(counts, draws.tolist(), strict=True):
        generator = torch.Generator().manual_seed((draw + salt) % (1 << 63))
        drawn = torch.rand(width + 1, count, generator=generator) * 2 - 1
        columns.append((drawn / math.sqrt(width)).to(regions.device))
    table = torch.cat(columns, dim=1)
    logits = regions @ table[:-1] + table[-1]
    return logits.masked_fill(~same, MASKED).softmax(dim=-1)
