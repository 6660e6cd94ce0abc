"""Optimiser, learning-rate schedule and weight averaging."""

from __future__ import annotations

from collections.abc import Mapping
from math import cos, pi

import torch
from torch import Tensor, nn

from kdcli.options import OptimOptions

REFERENCE_BATCH = 16  # images a step that optim.lr is given for (mmdet: 8 GPUs x 2 images)
STEP_FRACTIONS = (2 / 3, 11 / 12)  # epochs 8 and 11 of 12, 16 and 22 of 24
WARMUP_START = 0.001


def make_optimizer(module: nn.Module, options: OptimOptions, batch: int) -> torch.optim.Optimizer:
    """SGD (decay on everything, as mmdet) or AdamW (no decay on norms and biases), lr scaled to the global batch."""
    lr = scaled_lr(options, batch)
    trainable = [p for p in module.parameters() if p.requires_grad]
    # on a CPU one kernel for all parameters: 183 of them one by one take 4 ms a step; a GPU's default does that by itself
    fused = True if all(p.device.type == "cpu" for p in trainable) else None
    if options.name == "sgd":
        momentum, decay = options.momentum, options.weight_decay
        return torch.optim.SGD(trainable, lr=lr, momentum=momentum, weight_decay=decay, fused=fused)
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, fused=fused)


def check_ownership(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every trainable parameter sits in exactly one group: an adapter that no optimiser owns never learns."""
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    assert len(owned) == len(set(owned)), "a parameter is in two optimiser groups"
    assert set(owned) == set(wanted), f"not in the optimiser: {[n for k, n in wanted.items() if k not in set(owned)]}"


def scaled_lr(options: OptimOptions, batch: int) -> float:
    """The linear scaling rule (arXiv 1706.02677). ``options.lr`` is resolved: a number."""
    assert options.lr is not None
    return options.lr * batch / REFERENCE_BATCH


def warmup_steps(options: OptimOptions, total: int) -> int:
    """min(500, 10 % of all steps) unless given."""
    return min(500, total // 10) if options.warmup_steps is None else options.warmup_steps


def lr_factor(options: OptimOptions, step: int, steps_per_epoch: int, epochs: int) -> float:
    """What the peak learning rate is multiplied by at ``step`` (0-based): warm-up, then the schedule."""
    total = steps_per_epoch * epochs
    warmup = warmup_steps(options, total)
    if options.schedule == "cosine":
        factor = 0.5 * (1 + cos(pi * step / total))
    else:
        epoch = step // steps_per_epoch  # epochs that are over
        steps = [round(epochs * f) for f in STEP_FRACTIONS] if options.steps is None else options.steps
        factor = 0.1 ** sum(epoch >= last for last in steps)
    if step < warmup:
        factor *= WARMUP_START + (1 - WARMUP_START) * step / warmup
    return factor


class WeightAverage:
    """Exponential moving average of a module's state; integer buffers are copied."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """One step; the decay ramps up as (1 + n) / (10 + n), so that the first weights are soon forgotten."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in module.state_dict().items():
            mine = self.state[name]
            if mine.dtype.is_floating_point:
                mine.lerp_(value.detach(), 1 - decay)
            else:
                mine.copy_(value)

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Continue from a saved average."""
        for name, value in state.items():
            self.state[name].copy_(value)
        self.updates = updates
