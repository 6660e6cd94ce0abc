"""The one vocabulary of tensor names, and the letters their shapes are written in.

B images, P cells of all levels, A anchors per cell, N = P*A, C channels, K foreground classes, E = reg_max + 1 bins per
edge, G ground-truth boxes, M sparse entries. Levels are concatenated fine to coarse, cells are row-major, anchors
innermost. The same key is what a detector returns, what a method needs and what the store calls its array.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

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
BACKBONE = ("backbone/c2", "backbone/c3", "backbone/c4", "backbone/c5")  # [B, cells of that level, C] stage outputs
GT_ROIS = "gt_rois"  # [sum G, 2, C, 3, 3] features of every box on the two finest levels, RoI-aligned (derived)
PROPOSAL_BOXES = "proposals/boxes"  # [sum R, 4] the teacher's proposals and the ground-truth boxes, xyxy canvas pixels
PROPOSAL_LOGITS = "proposals/logits"  # [sum R, K + 1] of the RoI head, background last
PROPOSAL_COUNT = "proposals/count"  # [B] int64, R of each image; comes with the two above
PROPOSAL_LABELS = "proposals/labels"  # [sum S] int64 of the sampled proposals, K = background; made in the step

# what a derived tensor is computed from: a detector that gives the one can give the other
DERIVED = {RANK: CLS_LOGITS, BOXES: CLS_LOGITS, GT_ROIS: FEATURES}

Tensors = dict[str, Tensor]


class Region(StrEnum):
    """Where a tensor is read; all but the first and the last two depend on ground truth alone and are stored sparse."""

    ALL = "all"  # every valid cell: dense
    MAIN = "main"  # positives of the assigner
    VLR = "vlr"  # valuable localization region
    FINE_GRAINED = "fine_grained"  # anchors near a box
    OBJECT = "object"  # DeFeat's foreground cells
    SAMPLE = "sample"  # a random share of DeFeat's background cells
    INSIDE = "inside"  # cells whose centre lies in a box
    GT = "gt"  # a row for each ground-truth box
    PROPOSALS = "proposals"  # a row for each proposal of the teacher


MAIN_OR_VLR = f"{Region.MAIN}+{Region.VLR}"  # a union of regions


class Per(StrEnum):
    """What a tensor has a row for; that of a single level has another one: see ``per_level``."""

    CELL = "cell"  # P rows an image
    ANCHOR = "anchor"  # N
    BOX = "box"  # G
    PROPOSAL = "proposal"  # R


def per_level(level: int) -> str:
    """``level1`` for the cells of the second finest level; others likewise."""
    return f"level{level}"


def level_of_per(per: str) -> int | None:
    """The level of ``per_level``; None for a member of ``Per``."""
    return int(per.removeprefix("level")) if per.startswith("level") else None


@dataclass(frozen=True)
class TensorSpec:
    """What a detector promises about one tensor: what it has a row for, and the trailing dims.

    ``per``: of ``Per`` or ``per_level``. ``dims``: trailing shape, e.g. ``(4, 17)``.
    """

    per: str
    dims: tuple[int, ...]


@dataclass(frozen=True, order=True)
class Need:
    """A teacher tensor that a method reads: its name and the region where it reads it.

    ``region``: a ``Region``, or a union of those that are stored sparse such as ``main+vlr``.
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
        return self.region == Region.ALL

    @property
    def at_entries(self) -> bool:
        """True when it is read at the entries of a region."""
        return self.region not in (Region.ALL, Region.GT, Region.PROPOSALS)


def spec_of(name: str, specs: Mapping[str, TensorSpec]) -> TensorSpec:
    """The spec of a tensor, derived ones included, of a detector with ``specs``. Raises KeyError when it has none."""
    if name not in DERIVED or name in specs:
        return specs[name]
    dims = specs[DERIVED[name]].dims
    return {
        RANK: TensorSpec(Per.ANCHOR, (2,)),
        BOXES: TensorSpec(Per.ANCHOR, (4,)),
        GT_ROIS: TensorSpec(Per.BOX, (2, *dims, 3, 3)),
    }[name]


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


def world_mean(value: Tensor, least: float | None = None) -> Tensor:
    """Mean of ``value`` over all processes: what a normaliser must be, since DDP averages the gradients.

    ``least``: what the sum over all processes is clamped at, before it is divided by their number: a clamp of the mean
    would be another one with each number of processes.
    """
    total = world_sum(value)
    return (total if least is None else total.clamp(min=least)) / world_size()


def precise(value: Tensor) -> Tensor:
    """``value`` in float32 at least: losses are not computed in the 8 bits of bf16. float64 stays what it is."""
    return value if value.dtype == torch.float64 else value.float()


def flatten_levels(maps: list[Tensor], trailing: tuple[int, ...]) -> Tensor:
    """Turn per-level maps [B, A*prod(trailing), H, W] into one [B, N, *trailing] tensor.

    Channel ``a * prod(trailing) + c`` of a map is component ``c`` of anchor ``a`` (mmdet's order).
    """
    batch = maps[0].shape[0]
    return torch.cat([m.permute(0, 2, 3, 1).reshape(batch, -1, *trailing) for m in maps], dim=1)
