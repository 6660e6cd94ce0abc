"""The one vocabulary of tensor names, and the letters their shapes are written in.

B images, P cells of all levels, A anchors per cell, N = P*A, C channels, K foreground classes, E = reg_max + 1 bins per
edge, G ground-truth boxes, M sparse entries. Levels are concatenated fine to coarse, cells are row-major, anchors
innermost. The same key is what a detector returns, what a method needs and what the store calls its array.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

FEATURES = "features"  # [B, P, C] neck maps
CLS_LOGITS = "cls_logits"  # [B, N, K] before the sigmoid, foreground classes only
BOX_REGRESSION = "box_regression"  # [B, N, 4] in the detector's own coding
BOX_DISTRIBUTION = "box_distribution"  # [B, N, 4, E] edge logits, left top right bottom
CENTERNESS = "centerness"  # [B, N, 1]
BOXES = "boxes"  # [B, N, 4] decoded, xyxy canvas pixels
RANK = "rank"  # [M, 2] ground-truth-class score and IoU of a positive (derived)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """What a detector promises about one tensor: per cell or per anchor, and the trailing dims.

    ``per``: ``"cell"`` (P rows an image) or ``"anchor"`` (N rows). ``dims``: trailing shape, e.g. ``(4, 17)``.
    """

    per: str
    dims: tuple[int, ...]


@dataclass(frozen=True, order=True)
class Need:
    """A teacher tensor that a method reads: its name and the region where it reads it.

    Regions: ``all`` (dense), ``main`` (positives of the assigner), ``vlr`` (valuable localization region),
    ``main+vlr``. Everything but ``all`` depends on ground truth alone and is stored sparse.
    """

    name: str
    region: str

    @property
    def key(self) -> str:
        """``name@region``: the key in teacher tensors and the array name in a store."""
        return f"{self.name}@{self.region}"

    @property
    def dense(self) -> bool:
        """True when every valid cell is read."""
        return self.region == "all"


def world_size() -> int:
    """Number of training processes (1 outside torchrun)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def world_sum(value: Tensor) -> Tensor:
    """Sum of ``value`` over all processes, without gradient; ``value`` itself on one process.

    Normalisers and gates are over the global batch, so that 1 and N processes agree.
    """
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def world_mean(value: Tensor) -> Tensor:
    """Mean of ``value`` over all processes: what a normaliser must be, since DDP averages the gradients."""
    return world_sum(value) / world_size()


def flatten_levels(maps: list[Tensor], trailing: tuple[int, ...]) -> Tensor:
    """Turn per-level maps [B, A*prod(trailing), H, W] into one [B, N, *trailing] tensor.

    Channel ``a * prod(trailing) + c`` of a map is component ``c`` of anchor ``a`` (mmdet's order).
    """
    batch = maps[0].shape[0]
    return torch.cat([m.permute(0, 2, 3, 1).reshape(batch, -1, *trailing) for m in maps], dim=1)
