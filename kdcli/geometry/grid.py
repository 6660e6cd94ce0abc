"""The grid of cells and anchors that a dense head predicts on.

The rule is mmdet's: a level has ceil(size / stride) cells, a cell's centre is (index + offset) * stride, also where it
lies over the edge of the canvas, and base anchors are not rounded. torchvision's generator differs: the sides of base
anchors are cut to whole pixels and their corners rounded (up to 0.63 px), and centres lie canvas // cells apart (106 px
on P7 of a canvas 320 wide, so that the last one is 44 px off). Its weights were trained so: two fields say which rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from kdcli.errors import OptionError, did_you_mean
from kdcli.geometry.spec import JsonSpec
from kdcli.structures import Canvas

StrideRule = Literal["nominal", "image_over_grid"]
VALID_MULTIPLE = 32  # the content is rounded up to this many pixels: mmdet's pad_shape (pad_size_divisor)


@dataclass(frozen=True, kw_only=True)
class Grid(JsonSpec):
    """Cells and anchors of all levels, fine to coarse; cells row-major; anchors innermost (ratio-major, scale-minor).

    The tensors are made once per canvas and shared: never modify one in place. Equal grids give equal tensors.
    """

    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    offset: float = 0.0  # of a cell's centre, in strides: anchors 0, FCOS points 0.5
    base_scale: float = 8.0  # side of the base anchor / stride: 8 for ATSS and GFL, 4 for RetinaNet
    scales: tuple[float, ...] = (1.0,)  # of the base anchor: 2^0, 2^(1/3), 2^(2/3) for RetinaNet
    ratios: tuple[float, ...] = (1.0,)  # height / width
    stride_rule: StrideRule = "nominal"  # distance of centres; image_over_grid: canvas side // cells, torchvision's
    rounded_base: bool = False  # torchvision's: base sides cut to whole pixels, then corners rounded

    def __post_init__(self) -> None:
        if self.stride_rule not in get_args(StrideRule):
            raise OptionError(
                f"stride_rule '{self.stride_rule}': unknown{did_you_mean(self.stride_rule, get_args(StrideRule))}"
            )
        if not (self.strides and self.scales and self.ratios):
            raise OptionError(f"{self}: strides, scales and ratios need at least one number each")
        if min(*self.strides, *self.scales, *self.ratios, self.base_scale) <= 0:
            raise OptionError(f"{self}: strides, scales, ratios and base_scale must be positive")

    @property
    def num_anchors(self) -> int:
        """A: anchors per cell."""
        return len(self.scales) * len(self.ratios)

    def level_shapes(self, canvas: Canvas) -> list[tuple[int, int]]:
        """(rows, columns) of each level."""
        return [(-(-canvas.height // s), -(-canvas.width // s)) for s in self.strides]

    def level_sizes(self, canvas: Canvas) -> list[int]:
        """Anchors of each level; their sum is N."""
        return [cells * self.num_anchors for cells in self.level_cells(canvas)]

    def level_cells(self, canvas: Canvas) -> list[int]:
        """Cells of each level; their sum is P."""
        return [h * w for h, w in self.level_shapes(canvas)]

    def split_levels(self, value: Tensor, canvas: Canvas, dim: int = 1) -> list[Tensor]:
        """Cut ``value``, which has P cells along ``dim`` (e.g. [B, P, ...]), into its levels, fine to coarse; no copies."""
        return list(torch.split(value, self.level_cells(canvas), dim=dim))

    def level_maps(self, features: Tensor, canvas: Canvas, count: int | None = None) -> list[Tensor]:
        """``features`` [B, P, C] as the maps that they were flattened from: [B, C, rows, columns] of the ``count`` finest
        levels, or of all."""
        parts = self.split_levels(features, canvas)[:count]
        batch, _, channels = features.shape
        shapes = self.level_shapes(canvas)[:count]
        return [part.mT.reshape(batch, channels, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def steps(self, canvas: Canvas) -> list[tuple[int, int]]:
        """(down, across): pixels between the centres of neighbouring cells of each level. The stride, or nearly so."""
        if self.stride_rule == "nominal":
            return [(s, s) for s in self.strides]
        return [(canvas.height // h, canvas.width // w) for h, w in self.level_shapes(canvas)]

    def num_cells(self, canvas: Canvas) -> int:
        """P: cells of all levels; the same for a canvas and its transpose."""
        return sum(self.level_cells(canvas))

    def num_total(self, canvas: Canvas) -> int:
        """N = P * A: anchors of all levels."""
        return self.num_cells(canvas) * self.num_anchors

    def centers(self, canvas: Canvas, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> Tensor:
        """Centres of the cells, [P, 2] (x, y) in canvas pixels."""
        return _centers(self, canvas, dtype, device or torch.device("cpu"))

    def anchors(self, canvas: Canvas, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> Tensor:
        """Anchors, [N, 4] xyxy in canvas pixels; anchor a = ratio * len(scales) + scale of its cell."""
        return _anchors(self, canvas, dtype, device or torch.device("cpu"))

    def anchor_columns(self, canvas: Canvas) -> Tensor:
        """The anchors by coordinate, [4, N] float64: for whoever reads one coordinate at a time. Never modify it in place."""
        return _anchor_columns(self, canvas)

    def anchor_strides(
        self, canvas: Canvas, dtype: torch.dtype = torch.float64, device: torch.device | None = None
    ) -> Tensor:
        """Stride of each anchor's level, [N] pixels."""
        return _anchor_strides(self, canvas, dtype, device or torch.device("cpu"))

    def valid_shapes(self, canvas: Canvas, content: tuple[int, int]) -> list[tuple[int, int]]:
        """(rows, columns) of each level's valid cells: the content (height, width) rounded up to 32, in strides."""
        padded = [-(-side // VALID_MULTIPLE) * VALID_MULTIPLE for side in content]
        return [
            (min(-(-padded[0] // s), h), min(-(-padded[1] // s), w))
            for s, (h, w) in zip(self.strides, self.level_shapes(canvas), strict=True)
        ]

    def valid(self, canvas: Canvas, content: tuple[int, int]) -> Tensor:
        """Cells within the content (height, width) rounded up to 32, [P] bool. Shared: never modify it in place."""
        return _valid(self, canvas, tuple(self.valid_shapes(canvas, content)))

    def valid_anchors(self, canvas: Canvas, content: tuple[int, int]) -> Tensor:
        """``valid`` for each anchor, [N] bool. Shared: never modify it in place."""
        valid = self.valid(canvas, content)
        return valid if self.num_anchors == 1 else valid.repeat_interleave(self.num_anchors)


@lru_cache(maxsize=256)  # of an image it is asked for four times; 67 shapes of content fit into 800x1344, of 22 kB each
def _valid(grid: Grid, canvas: Canvas, shapes: tuple[tuple[int, int], ...]) -> Tensor:
    parts = []
    for (h, w), (rows, cols) in zip(grid.level_shapes(canvas), shapes, strict=True):
        level = torch.zeros(h, w, dtype=torch.bool)
        level[:rows, :cols] = True
        parts.append(level.reshape(-1))
    return torch.cat(parts)


@lru_cache(maxsize=64)
def _centers(grid: Grid, canvas: Canvas, dtype: torch.dtype, device: torch.device) -> Tensor:
    parts = []
    for (down, across), (h, w) in zip(grid.steps(canvas), grid.level_shapes(canvas), strict=True):
        y = (torch.arange(h, dtype=torch.float64) + grid.offset) * down
        x = (torch.arange(w, dtype=torch.float64) + grid.offset) * across
        parts.append(torch.stack([x.repeat(h), y.repeat_interleave(w)], dim=-1))
    return torch.cat(parts).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def _anchors(grid: Grid, canvas: Canvas, dtype: torch.dtype, device: torch.device) -> Tensor:
    root = torch.tensor(grid.ratios, dtype=torch.float64).sqrt()[:, None]
    scales = torch.tensor(grid.scales, dtype=torch.float64)[None] * grid.base_scale
    cpu = torch.device("cpu")
    strides = _anchor_strides(grid, canvas, torch.float64, cpu)[:: grid.num_anchors, None, None]
    sides = scales * strides  # [P, 1, scales], pixels
    if grid.rounded_base:
        sides = sides.floor()
    half = torch.stack([(sides / root).flatten(1), (sides * root).flatten(1)], dim=-1) / 2  # [P, A, 2]
    if grid.rounded_base:
        half = half.round()
    shift = _centers(grid, canvas, torch.float64, cpu).repeat(1, 2)[:, None]
    return (shift + torch.cat([-half, half], dim=-1)).reshape(-1, 4).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def _anchor_columns(grid: Grid, canvas: Canvas) -> Tensor:
    return grid.anchors(canvas).T.contiguous()


@lru_cache(maxsize=64)
def _anchor_strides(grid: Grid, canvas: Canvas, dtype: torch.dtype, device: torch.device) -> Tensor:
    sizes = torch.tensor(grid.level_sizes(canvas))
    return torch.tensor(grid.strides).repeat_interleave(sizes).to(device=device, dtype=dtype)
