"""Feature imitation decoupled into foreground and background, and the adapters that it goes through (DeFeat)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdcli.methods.base import Pair
from kdcli.tensors import FEATURES, world_mean

INIT_SCALE = 1e-4  # of an adapter's weights: at first its output is almost 0


def adapter(ours: int, theirs: int) -> nn.Conv2d:
    """A 3x3 convolution from ``ours`` to ``theirs`` channels, initialised as in DeFeat's official code."""
    conv = nn.Conv2d(ours, theirs, kernel_size=3, padding=1)
    with torch.no_grad():
        conv.weight.normal_().fmod_(2).mul_(INIT_SCALE)
    return conv


def neck_adapters(pair: Pair) -> nn.ModuleList:
    """One ``adapter`` for each level of the neck."""
    ours, theirs = pair.student[FEATURES].dims[0], pair.teacher[FEATURES].dims[0]
    return nn.ModuleList(adapter(ours, theirs) for _ in pair.grid.strides)


def adapt(features: Tensor, adapters: nn.ModuleList, shapes: list[tuple[int, int]], valid: Tensor) -> Tensor:
    """Student features [B, P, C] through one adapter a level (rows, columns of ``shapes``): [B, P, C of the teacher].

    Cells that are not ``valid`` [B, P] are 0, like those beyond the edge of a map: padding never reaches a loss.
    """
    kept = features.masked_fill(~valid[..., None], 0.0)
    levels = torch.split(kept, [h * w for h, w in shapes], dim=1)
    maps = []
    for conv, level, (rows, columns) in zip(adapters, levels, shapes, strict=True):
        output = conv(level.reshape(len(level), rows, columns, -1).permute(0, 3, 1, 2))
        maps.append(output.flatten(2).transpose(1, 2))
    return torch.cat(maps, dim=1)


def decoupled_imitation(errors: list[Tensor], inside: list[Tensor], valid: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(foreground, background): on each level half the mean error of the batch's cells of that kind; mean over levels.

    Per level: ``errors`` [B, P_l], the squared difference of a cell averaged over channels; ``inside``, ``valid``
    [B, P_l] bool. arXiv 2103.14475. Counts are of the global batch; a level without such cells gives 0.
    """

    def part(masks: list[Tensor]) -> Tensor:
        totals = [(error * mask).sum() for error, mask in zip(errors, masks, strict=True)]
        return half_mean(torch.stack(totals), torch.stack([mask.sum() for mask in masks]))

    foreground = [m & v for m, v in zip(inside, valid, strict=True)]
    background = [~m & v for m, v in zip(inside, valid, strict=True)]
    return part(foreground), part(background)


def half_mean(total: Tensor, count: Tensor) -> Tensor:
    """Half of total / count of each level, then the mean over levels: a scalar of sums [L] and counts [L]."""
    return (total / (2 * world_mean(count.float(), least=1))).mean()
