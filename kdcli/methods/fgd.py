"""FGD: Focal and Global Knowledge Distillation for Detectors (CVPR 2022, arXiv 2111.11837).

Focal: the neck maps are imitated on foreground and background apart, weighted by where and in which channels the teacher
is active, and the student's activity itself is pulled to the teacher's. Global: the maps are imitated once more after a
context block that is trained on either side. Numbers are those of the official code (yzd-v/FGD).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdcli.geometry.grid import Grid
from kdcli.methods.base import Method, Pair
from kdcli.methods.maps import MAPS, MASKED, channels, image_of, mean_images
from kdcli.structures import Batch, Canvas
from kdcli.tensors import Tensors, precise

TWO_STAGE = {"fg_weight": 5e-5, "bg_weight": 2.5e-5, "attention_weight": 5e-5, "relation_weight": 5e-7}
TWO_STAGE_LEVELS = 4  # P2..P5: the official two-stage configurations have no P6, which is P5 pooled
# the official FCOS configuration, the only dense one that differs
FCOS = {"fg_weight": 1.6e-3, "bg_weight": 8e-4, "attention_weight": 8e-4, "relation_weight": 8e-6, "temperature": 0.8}


class FGD(Method):
    """Foreground, background, attention and global relation.

    Options: ``fg_weight``, ``bg_weight``, ``attention_weight``, ``relation_weight`` (alpha, beta, gamma, lambda of the
    paper); ``temperature`` of both attentions. On Faster R-CNN the levels P2 to P5 are read, elsewhere all. Sums over
    cells and channels, divided by the images of the global batch. When the channels differ, a 1x1 convolution for each
    level maps the student's to the teacher's.
    """

    title = "Focal and Global Knowledge Distillation for Detectors, CVPR 2022, arXiv 2111.11837"
    evidence = "paper's abstract, official code; masking padding and weights for ATSS are ours"
    offline = "exact, dense"
    needs = (MAPS,)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"faster_rcnn": TWO_STAGE, "fcos": FCOS}
    index_aligned = False

    def __init__(
        self,
        pair: Pair,
        *,
        fg_weight: float = 1e-3,
        bg_weight: float = 5e-4,
        attention_weight: float = 5e-4,
        relation_weight: float = 5e-6,
        temperature: float = 0.5,
    ) -> None:
        super().__init__()
        self.grid, self.temperature = pair.grid, temperature
        weights = {"fg": fg_weight, "bg": bg_weight, "attention": attention_weight, "relation": relation_weight}
        self.weights = {name: weight for name, weight in weights.items() if weight}
        ours, theirs = channels(pair)
        levels = range(TWO_STAGE_LEVELS if pair.detector == "faster_rcnn" else len(pair.grid.strides))
        self.adapters = nn.ModuleList([nn.Identity() if ours == theirs else nn.Linear(ours, theirs) for _ in levels])
        # without its term a module would have no gradient, which DDP refuses
        blocks = levels if relation_weight else range(0)
        self.student = nn.ModuleList([ContextBlock(theirs) for _ in blocks])
        self.teacher = nn.ModuleList([ContextBlock(theirs) for _ in blocks])

    def forward(self, student: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
        """``fg``, ``bg``, ``attention`` and ``relation``, without those whose weight is 0."""
        if not self.weights:
            return {}
        totals: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        maps = (precise(student[MAPS.key]), precise(teacher[MAPS.key].detach()), batch.targets.valid)
        levels = zip(*(self.grid.split_levels(v, batch.targets.canvas) for v in maps), strict=True)
        for i, (adapter, (s, t, valid)) in enumerate(zip(self.adapters, levels, strict=False)):
            s = precise(adapter(s))
            foreground = foreground_mask(batch.targets.boxes, valid, self.grid, batch.targets.canvas, i)
            found = focal_losses(s, t, foreground, valid, self.temperature)
            if "relation" in self.weights:
                added = self.student[i](s, valid), self.teacher[i](t, valid)
                found["relation"] = relation_loss(s + added[0], t + added[1], valid)
            for name, values in totals.items():
                values.append(found[name])
        images = mean_images(batch)
        return {name: self.weights[name] * torch.stack(values).sum() / images for name, values in totals.items()}

    def weight_option(self, part: str) -> str:
        """Each term has a weight of its own."""
        return f"{part}_weight"

    def active(self, batch: Batch, part: str) -> bool:
        """``fg`` needs a box, ``bg`` a cell of the finest level that no box covers."""
        targets = batch.targets
        if part == "fg":
            return any(len(b) for b in targets.boxes)
        if part == "bg":
            valid = self.grid.split_levels(targets.valid, batch.targets.canvas)[0]
            covered = foreground_mask(targets.boxes, valid, self.grid, targets.canvas, 0) > 0
            return bool((valid & ~covered).any())
        return True


class ContextBlock(nn.Module):
    """GcBlock (GCNet, arXiv 1904.11492): what one attention-pooled vector of an image adds to each of its cells.

    The code's pooling convolution has a bias too, which its softmax does not see; it is left out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 2, 1)
        self.pool = nn.Linear(channels, 1, bias=False)
        self.add = nn.Sequential(nn.Linear(channels, inner), nn.LayerNorm(inner), nn.ReLU(), nn.Linear(inner, channels))
        nn.init.kaiming_normal_(self.pool.weight)
        last = self.add[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)  # starts by adding nothing
        nn.init.zeros_(last.bias)

    def forward(self, value: Tensor, valid: Tensor) -> Tensor:
        """[B, 1, C] of ``value`` [B, cells, C], pooled over the ``valid`` [B, cells]."""
        attention = self.pool(value).masked_fill(~valid[..., None], MASKED).softmax(dim=1)  # [B, cells, 1]
        added: Tensor = self.add(attention.mT @ value)
        return added


def foreground_mask(boxes: list[Tensor], valid: Tensor, grid: Grid, canvas: Canvas, level: int) -> Tensor:
    """1 / (area of the smallest box over the cell, in cells) on foreground cells, 0 elsewhere: [B, cells] of a level.

    ``boxes`` B x [G, 4] canvas pixels, ``valid`` [B, cells]. A box covers the cells floor(x1 / stride) to
    ceil(x2 / stride), both included, and its area counts them also where the map ends, as in the official code.
    """
    every = torch.cat(boxes)
    stride, (rows, columns) = grid.strides[level], grid.level_shapes(canvas)[level]
    low, high = (every[:, :2] / stride).floor(), (every[:, 2:] / stride).ceil()  # [S, 2] x, y
    x, y = torch.arange(columns, device=every.device), torch.arange(rows, device=every.device)
    across = (x >= low[:, :1]) & (x <= high[:, :1])  # [S, columns]
    down = (y >= low[:, 1:]) & (y <= high[:, 1:])
    share = 1 / (high + 1 - low).prod(dim=1)
    covered = (down[:, :, None] & across[:, None]).flatten(1) * share[:, None]  # [S, cells]
    image = image_of([len(b) for b in boxes], every.device)
    mask = torch.zeros_like(valid, dtype=covered.dtype)
    return mask.scatter_reduce(0, image[:, None].expand_as(covered), covered, "amax") * valid


def attentions(value: Tensor, valid: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Spatial attention [B, cells], summing to the number of valid cells, and channel attention [B, C], summing to C.

    ``value`` [B, cells, C]: softmax over the cells of its mean magnitude, and over the channels of theirs.
    """
    inside = valid[..., None]
    size, cells = value.abs(), inside.sum(dim=1)  # cells: [B, 1]
    spatial = (size.mean(dim=2) / temperature).masked_fill(~valid, MASKED).softmax(dim=1) * cells
    mean = (size * inside).sum(dim=1) / cells.clamp(min=1)
    return spatial, (mean / temperature).softmax(dim=1) * value.shape[2]


def focal_losses(
    student: Tensor, teacher: Tensor, foreground: Tensor, valid: Tensor, temperature: float
) -> dict[str, Tensor]:
    """``fg``, ``bg`` and ``attention`` of one level, summed over images.

    ``student``, ``teacher``: [B, cells, C]; ``foreground``: shares [B, cells] of ``foreground_mask``. A background cell
    counts one over the image's background cells.
    """
    background = ((foreground == 0) & valid).to(foreground.dtype)
    background = background / background.sum(dim=1, keepdim=True).clamp(min=1)
    ours, our_channels = attentions(student, valid, temperature)
    theirs, their_channels = attentions(teacher, valid, temperature)
    difference = theirs * ((student - teacher).square() * their_channels[:, None]).sum(dim=2)  # [B, cells]
    return {
        "fg": (difference * foreground).sum(),
        "bg": (difference * background).sum(),
        "attention": (ours - theirs).abs().sum() + (our_channels - their_channels).abs().sum(),
    }


def relation_loss(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Squared difference of [B, cells, C] over the ``valid`` [B, cells], summed over everything."""
    return ((student - teacher).square() * valid[..., None]).sum()
