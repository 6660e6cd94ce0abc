"""Room for a batch: large dense arrays are decompressed beside each other, so that a batch is made of rows without a copy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcli.store.arrays import ArraySpec
from kdcli.store.schema import collate
from kdcli.tensors import Tensors

LEAST_BYTES = 2**16  # of a row: a smaller array is copied in 5 us


@dataclass(frozen=True)
class Room:
    """The place of one row in a batch."""

    batch: dict[str, Tensor]  # [rows, ...] by array path; the same one in all rooms of a batch
    row: int

    def of(self, path: str) -> NDArray[Any] | None:
        """The place of this row in an array; None for an array that has no room."""
        return self.batch[path][self.row].numpy() if path in self.batch else None


class Placed(Protocol):
    """A row, or a sample with one."""

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """By path."""
        ...

    @property
    def room(self) -> Room | None:
        """That some of them are in."""
        ...


def make_rooms(layout: Iterable[ArraySpec], rows: int, *, shared: bool) -> list[Room]:
    """Room for ``rows`` rows. ``shared``: in memory that a data worker hands to the process that trains without a copy."""
    batch = {}
    for spec in layout:
        if not spec.sparse and spec.path.startswith("tensors/") and spec.row_bytes >= LEAST_BYTES:
            shape = (rows, *spec.shape)
            batch[spec.path] = _shared(shape, spec) if shared else torch.from_numpy(np.empty(shape, spec.numpy_type))
    return [Room(batch, row) for row in range(rows)]


def join(rows: Sequence[Placed], layout: Iterable[ArraySpec]) -> Tensors:
    """The arrays of a batch, as ``collate`` gives them: those that were read to the rooms of this very batch are there."""
    rooms = [row.room for row in rows]
    whole = rooms[0].batch if rooms[0] is not None else {}
    if any(room is None or room.batch is not whole or room.row != k for k, room in enumerate(rooms)):
        whole = {}
    whole = {path: value for path, value in whole.items() if len(value) == len(rows)}
    return collate([row.arrays for row in rows], [a for a in layout if a.path not in whole]) | whole


def _shared(shape: tuple[int, ...], spec: ArraySpec) -> Tensor:
    # as torch's own default_collate does it: share_memory_() of a tensor would copy what is in it
    kind: Any = torch.UntypedStorage
    typed = torch.from_numpy(np.empty(0, spec.numpy_type))
    return typed.new_empty(0).set_(kind._new_shared(shape[0] * spec.row_bytes)).view(shape)
