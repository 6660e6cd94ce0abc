"""Neck maps as the feature methods see them: cut into levels, with an adapter where the channels differ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdcli.methods.base import Pair
from kdcli.structures import Batch
from kdcli.tensors import FEATURES, Need, Region, world_mean

MAPS = Need(FEATURES, Region.ALL)
MASKED = -1e30  # a logit whose softmax is exactly 0 in float32, and whose differences stay finite, unlike -inf's


def channels(pair: Pair) -> tuple[int, int]:
    """C of the student's and of the teacher's neck maps."""
    return pair.student[FEATURES].dims[0], pair.teacher[FEATURES].dims[0]


def make_adapter(ours: int, theirs: int) -> nn.Module:
    """The 1x1 convolution from student to teacher channels, without bias; nothing when they are equal.

    On [B, P, C] a 1x1 convolution is a linear map of the last dimension.
    """
    return nn.Identity() if ours == theirs else nn.Linear(ours, theirs, bias=False)


def mean_images(batch: Batch) -> Tensor:
    """Images of a process, averaged over the processes, scalar: a sum over images divided by it is a global mean."""
    return world_mean(torch.tensor(float(len(batch.keys)), device=batch.targets.valid.device))


def image_of(counts: list[int], device: torch.device) -> Tensor:
    """Image [S] of each box, when image i has ``counts[i]`` boxes."""
    repeats = torch.tensor(counts, device=device)
    return torch.arange(len(counts), device=device).repeat_interleave(repeats, output_size=sum(counts))
