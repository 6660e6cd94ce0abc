"""What a store gives for a batch: rows as they are stored, which travel, and teacher tensors, which losses read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcli.api.view import StoreView
from kdcli.errors import OptionError
from kdcli.geometry.grid import Grid
from kdcli.structures import Batch, Canvas, Entries, RowKey
from kdcli.tensors import Tensors


@dataclass(frozen=True)
class StoredRows:
    """Rows of a batch, still encoded (8-bit codes by default): what a data worker sends to the process that trains.

    ``Store.decode`` makes teacher tensors of them, on the device where they are wanted.
    """

    views: tuple[StoreView, ...]
    batch: Batch  # its rows are encoded; it has no images, and no boxes where they were not given
    has_targets: bool

    @property
    def keys(self) -> list[RowKey]:
        """Image and view of each row."""
        return self.batch.keys


@dataclass(frozen=True)
class TeacherBatch:
    """Teacher tensors of a batch, decoded on their device, and where they were read.

    ``tensors``: float32, by ``name@region``. Dense ones are [B, P, C] or [B, N, ...], sparse ones [M', ...]: one row for
    each of ``entries`` in that region, in their order.
    """

    tensors: Tensors
    views: tuple[StoreView, ...]
    batch: Batch  # what kdcli's methods read beside them: entries, targets, keys; it has no images
    has_targets: bool  # whether boxes and labels are known
    grid: Grid

    @property
    def keys(self) -> list[RowKey]:
        """Image and view of each row."""
        return self.batch.keys

    @property
    def entries(self) -> Entries | None:
        """Where the sparse tensors were read: anchor index, region flags, box, weight and image of each; None: nowhere."""
        return self.batch.entries

    @property
    def counts(self) -> Tensor:
        """Entries of each image, [B] int64; zeros when every tensor is dense."""
        if self.entries is None:
            return torch.zeros(len(self.keys), dtype=torch.int64, device=self.valid.device)
        return torch.bincount(self.entries.image, minlength=len(self.keys))

    @property
    def canvas(self) -> Canvas:
        """The orientation of the canvas that all images of the batch share."""
        return self.batch.targets.canvas

    @property
    def valid(self) -> Tensor:
        """Cells that are not padding, [B, P] bool."""
        return self.batch.targets.valid

    @property
    def boxes(self) -> list[Tensor]:
        """Ground truth of each image, [G, 4] float32 xyxy canvas pixels. Raises OptionError when it was not given."""
        self.require_targets("boxes")
        return self.batch.targets.boxes

    @property
    def labels(self) -> list[Tensor]:
        """Labels of the boxes, [G] int64, positions in ``Store.classes``. Raises OptionError when they were not given."""
        self.require_targets("labels")
        return self.batch.targets.labels

    def require_targets(self, reader: str) -> None:
        """Raises OptionError, naming ``reader``, when the boxes of the batch are not known."""
        if not self.has_targets:
            raise OptionError(
                f"{reader}: the boxes of this batch are not known; give targets= to Store.read or Store.fetch, or data= to "
                "open_store"
            )

    def flatten(self, maps: Iterable[Tensor]) -> Tensor:
        """One map a level, [B, C, H, W], finest first, as one [B, P, C]: ``features`` as the store has them.

        Raises OptionError unless the maps have the shapes of the store's levels on the canvas of this batch.
        """
        given = list(maps)
        wanted = [(len(self.keys), *shape) for shape in self.grid.level_shapes(self.canvas)]
        found = [(m.shape[0], *m.shape[2:]) if m.ndim == 4 else tuple(m.shape) for m in given]
        if found != wanted:
            raise OptionError(
                f"the maps are {_shapes(found)} (batch, height, width), the store's levels on a canvas {self.canvas} are "
                f"{_shapes(wanted)}, at strides {', '.join(map(str, self.grid.strides))}; give those maps, finest first, of "
                "the pixels that StoreView.render gives"
            )
        return torch.cat([m.flatten(2).mT for m in given], dim=1)


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes) or "none"
