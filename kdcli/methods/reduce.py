"""Sums and moments over the batches of all processes that gradients flow through.

DDP averages the gradients of the processes. A term is therefore right when the mean of its values over the processes is
the loss of the whole batch, and when a statistic of the whole batch passes its gradient back to every process: the
backward pass of a sum over processes is again a sum over processes. Every process must reach these functions in the same
order, so nothing around them may depend on what a process's images hold.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdcli.tensors import world_size, world_sum


class _WorldSum(torch.autograd.Function):
    """All-reduce forward and backward. torch.distributed.nn has one too, but that module is deprecated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def world_sum_grad(value: Tensor) -> Tensor:
    """Sum of ``value`` over all processes, with gradient; ``value`` itself on one process."""
    if world_size() == 1:
        return value
    total: Tensor = _WorldSum.apply(value)
    return total


def world_moments(value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], variance [C] (divided by the count) and count (scalar) of ``value`` [B, cells, C] over all processes.

    ``weight`` [B, cells, 1]: 1 for what counts, 0 for the rest. Without any weight both moments are 0. Two passes: the
    difference of two large sums would lose the variance of a channel whose mean is far from 0.
    """
    count = world_sum(weight.sum())
    safe = count.clamp(min=1)
    mean = world_sum_grad((value * weight).sum(dim=(0, 1))) / safe
    variance = world_sum_grad(((value - mean).square() * weight).sum(dim=(0, 1))) / safe
    return mean, variance, count


def safe_sqrt(value: Tensor) -> Tensor:
    """Square root whose value and gradient are 0 at 0, where that of ``sqrt`` is infinite: norms of equal tensors."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), 0.0)
