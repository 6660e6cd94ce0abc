"""Values that travel between the packages: canvas, targets, entries, batches, detections."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kdcli.errors import OptionError
from kdcli.limits import MAX_SIDE
from kdcli.tensors import Region, Tensors

BACKGROUND = -1  # of Targets.assigned: a negative
IGNORED = -2  # of Targets.assigned: outside the valid area, or between two IoU thresholds: no loss reads it

# Bits of Entries.flag. The last four mark cells, by the first anchor of the cell.
MAIN = 1  # positives of the assigner
VLR = 2  # valuable localization region
FINE_GRAINED = 4  # anchors near a box: LD's feature imitation
OBJECT = 8  # DeFeat's foreground cells
SAMPLE = 16  # a random share of DeFeat's background cells
INSIDE = 32  # cells whose centre lies in a box: LD's feature imitation
FLAGS: dict[str, int] = {
    Region.MAIN: MAIN,
    Region.VLR: VLR,
    Region.FINE_GRAINED: FINE_GRAINED,
    Region.OBJECT: OBJECT,
    Region.SAMPLE: SAMPLE,
    Region.INSIDE: INSIDE,
}


@dataclass(frozen=True)
class Canvas:
    """A fixed image size in pixels, each side a multiple of 32. ``height x width`` stands for itself and its transpose."""

    height: int
    width: int

    def __post_init__(self) -> None:
        if max(self.height, self.width) > MAX_SIDE:
            raise OptionError(f"canvas {self}: a side has at most {MAX_SIDE:,} pixels")
        if self.height < 32 or self.width < 32 or self.height % 32 or self.width % 32:
            raise OptionError(f"canvas {self}: each side must be a positive multiple of 32, e.g. 320 or 256x320")

    @staticmethod
    def parse(text: str) -> Canvas:
        """Read ``"640"`` (a square) or ``"800x1344"`` (height x width)."""
        parts = str(text).lower().split("x")
        if len(parts) not in (1, 2) or not all(p.isascii() and p.isdigit() and len(p) < 7 for p in parts):
            raise OptionError(f"canvas '{text}': write one number or HEIGHTxWIDTH, e.g. 320 or 256x320")
        return Canvas(int(parts[0]), int(parts[-1]))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return (self.height, self.width)

    @property
    def transposed(self) -> Canvas:
        """The other orientation."""
        return Canvas(self.width, self.height)

    def __str__(self) -> str:
        return str(self.height) if self.height == self.width else f"{self.height}x{self.width}"


@functools.cache
def flag_bits(region: str) -> int:
    """The bits of ``Entries.flag`` that put an entry into ``region``, e.g. ``main+vlr``."""
    return sum(FLAGS[part] for part in set(region.split("+")))


@dataclass(frozen=True)
class Entries:
    """The sparse positions of one image, or of a batch, where teacher tensors are read. Sorted by image, then index.

    A tensor on region ``main`` has one row for each entry whose flag has the MAIN bit, in this order; likewise for the
    other regions of FLAGS; on ``main+vlr`` one row for each entry with either bit.
    """

    index: Tensor  # [M] int64, anchor index in 0..N-1
    flag: Tensor  # [M] uint8, MAIN | VLR
    gt: Tensor  # [M] int64, ground-truth box (index within its image) of a main entry, -1 otherwise
    weight: Tensor  # [M] float32, IoU weight of a VLR entry, 0 otherwise
    image: Tensor  # [M] int64, image within the batch (zeros for a single image)

    def select(self, region: str) -> Tensor:
        """Boolean mask [M] of the entries that belong to ``region``."""
        return (self.flag & flag_bits(region)) != 0

    @staticmethod
    def collate(parts: Sequence[Entries]) -> Entries:
        """Join the entries of single images into those of a batch."""
        image = torch.cat([torch.full_like(p.index, i) for i, p in enumerate(parts)])
        return Entries(
            index=torch.cat([p.index for p in parts]),
            flag=torch.cat([p.flag for p in parts]),
            gt=torch.cat([p.gt for p in parts]),
            weight=torch.cat([p.weight for p in parts]),
            image=image,
        )

    def to(self, device: torch.device) -> Entries:
        """A copy on ``device``."""
        return Entries(
            *(t.to(device, non_blocking=True) for t in (self.index, self.flag, self.gt, self.weight, self.image))
        )


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a batch should be detected as. Not crowd, sides >= 1 canvas pixel.

    ``assigned`` holds, for each anchor, the index of its ground-truth box within the image, BACKGROUND or IGNORED; it
    is computed once, in the data worker, in float64, and read by the detection loss and by the regions alike.
    """

    boxes: list[Tensor]  # B x [G, 4] float32, xyxy canvas pixels
    labels: list[Tensor]  # B x [G] int64, 0..K-1
    content: Tensor  # [B, 2] int64, (height, width) of the image's own content on the canvas, pixels
    canvas: Canvas  # the orientation that all images of the batch share
    assigned: Tensor  # [B, N] int32
    valid: Tensor  # [B, P] bool, cells inside the content rounded up to 32
    draws: Tensor | None = (
        None  # [B] int64, a seed for each image, of (seed, epoch, image): what sampling heads draw from
    )

    def to(self, device: torch.device) -> Targets:
        """A copy on ``device``."""
        return replace(
            self,
            boxes=[b.to(device, non_blocking=True) for b in self.boxes],
            labels=[x.to(device, non_blocking=True) for x in self.labels],
            content=self.content.to(device, non_blocking=True),
            assigned=self.assigned.to(device, non_blocking=True),
            valid=self.valid.to(device, non_blocking=True),  # draws stay on the CPU, where generators are seeded
        )


@dataclass(frozen=True)
class RowKey:
    """Names a row: which image (by its annotation id), seen in which view."""

    image_id: int
    view: str

    def __str__(self) -> str:
        return f"image {self.image_id}, view {self.view}"


@dataclass(frozen=True)
class Batch:
    """What one training step sees."""

    images: Tensor  # [B, 3, H, W] uint8, the clean canvases
    targets: Targets
    keys: list[RowKey]
    entries: Entries | None = None  # where sparse teacher tensors are read; None in plain training
    rows: Tensors = field(default_factory=dict)  # stored teacher arrays, still encoded; empty with a live teacher
    digests: bytes = b""  # of the image files, eight bytes each: see engine/loading/seen.py

    def to(self, device: torch.device) -> Batch:
        """A copy on ``device``; stored arrays travel as their 8-bit codes and are decoded there."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            targets=self.targets.to(device),
            entries=None if self.entries is None else self.entries.to(device),
            rows={k: v.to(device, non_blocking=True) for k, v in self.rows.items()},
        )


@dataclass(frozen=True)
class Detections:
    """Decoded predictions of one image, best first."""

    boxes: Tensor  # [D, 4] float32, xyxy canvas pixels
    scores: Tensor  # [D] float32, 0..1
    labels: Tensor  # [D] int64, 0..K-1
