"""What the cases of ``mmdet_cases/faster_rules.npz`` start from: an RPN's outputs, feature maps, boxes and head weights.

All are drawn by ``RandomState``, which gives the same numbers with every numpy, for mmdet (``make_faster_rules.py``) and
for the tests that read what mmdet made of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcli.structures import Canvas

CANVAS = Canvas(128, 160)
CONTENT = ((128, 160), (70, 100), (128, 130))  # the second is padded to 96 x 128, the third to 128 x 160
SHAPES = ((32, 40), (16, 20), (8, 10), (4, 5), (2, 3))
CELLS = sum(h * w for h, w in SHAPES)
ANCHORS, CLASSES, CHANNELS, WIDTH = 3, 3, 8, 16

BOXES = (
    (
        (10.2, 10.7, 41.3, 43.1),  # near an anchor: IoU above 0.7
        (60.4, 20.3, 120.2, 39.6),  # elongated: at best between 0.3 and 0.7
        (80.3, 90.1, 85.2, 95.7),  # tiny: below 0.3
        (33.1, 61.2, 97.5, 124.4),  # three that want one anchor
        (36.6, 57.4, 93.2, 121.9),
        (28.3, 66.1, 104.4, 125.7),
        (112.0, 64.0, 144.0, 96.0),  # an anchor itself
        (112.0, 64.0, 144.0, 96.0),  # again, of another class
    ),
    (
        (1.3, 0.4, 99.2, 69.1),  # its best anchors are centred in the padding
        (70.3, 40.2, 99.6, 69.7),
        (20.1, 6.9, 62.5, 59.8),  # around several anchors: one IoU but for rounding
    ),
    (),
)


def labels() -> list[Tensor]:
    """Count up, so that the equal boxes have different ones."""
    return [torch.arange(len(b)) % CLASSES for b in BOXES]


def boxes() -> list[Tensor]:
    """[G, 4] float32 of each image."""
    return [torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in BOXES]


def _draw(seed: int, *shape: int) -> Tensor:
    values: NDArray[Any] = np.random.RandomState(seed).standard_normal(shape)
    return torch.from_numpy(values).float()


def rpn_outputs() -> tuple[Tensor, Tensor]:
    """Logits [B, N, 1] and deltas [B, N, 4]: wide enough that more than 1000 boxes survive NMS, some of them clipped away
    and some that the limit on a side's growth stops."""
    count = CELLS * ANCHORS
    logits, deltas = _draw(1, len(BOXES), count, 1), 0.5 * _draw(2, len(BOXES), count, 4)
    deltas[:, ::50, 2:] *= 12
    return logits * 2, deltas


def features() -> Tensor:
    """[B, P, C]: the neck's maps, one after the other."""
    return _draw(3, len(BOXES), CELLS, CHANNELS)


def head() -> dict[str, Tensor]:
    """Weights of the RoI head by mmdet's names; large enough that some scores pass 0.05."""
    inputs = CHANNELS * 49
    return {
        "shared_fcs.0.weight": _draw(4, WIDTH, inputs) / inputs**0.5, "shared_fcs.0.bias": 0.1 * _draw(5, WIDTH),
        "shared_fcs.1.weight": _draw(6, WIDTH, WIDTH) / WIDTH**0.5, "shared_fcs.1.bias": 0.1 * _draw(7, WIDTH),
        "fc_cls.weight": 3 * _draw(8, CLASSES + 1, WIDTH), "fc_cls.bias": _draw(9, CLASSES + 1),
        "fc_reg.weight": _draw(10, 4 * CLASSES, WIDTH), "fc_reg.bias": _draw(11, 4 * CLASSES),
    }  # fmt: skip


def rois() -> Tensor:
    """[R, 5] (image, xyxy): all levels, sides at their limits, and boxes thinner than a cell, partly over the edge."""
    sides = [0.3, 2, 8, 30, 55.9, 56, 100, 111.9, 112, 112.1, 150, 223.9, 224, 300, 447, 448, 460]
    rows = [[k % 3, -3.0 + k, 2.0 * k, -3.0 + k + side, 2.0 * k + side] for k, side in enumerate(sides)]
    rows += [[0, 20.0, 5, 150, 6.5], [1, 90.2, 30.3, 90.9, 120.4], [2, 150, 120, 175, 140]]
    return torch.tensor(rows, dtype=torch.float32)
