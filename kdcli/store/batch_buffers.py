"""The memory of a batch: large dense arrays are decompressed beside each other, so that rows are collated without a copy.

``allocate_batch`` gives each row a ``BatchSlot`` to be read into; ``collate_rows`` copies what is not there already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcli.store.arrays import ArraySpec
from kdcli.tensors import Tensors

LEAST_BYTES = 2**16  # of a row: a smaller array is copied in 5 us


@dataclass(frozen=True)
class BatchSlot:
    """The part of a batch's memory that one row is read into."""

    batch: dict[str, Tensor]  # [rows, ...] by array path; the same one in all slots of a batch
    row: int

    def of(self, path: str) -> NDArray[Any] | None:
        """Where this row of an array goes; None for an array that is not allocated for the batch."""
        return self.batch[path][self.row].numpy() if path in self.batch else None


class SlottedRow(Protocol):
    """A row, or a sample with one."""

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """By path."""
        ...

    @property
    def slot(self) -> BatchSlot | None:
        """That some of them are in."""
        ...


def allocate_batch(layout: Iterable[ArraySpec], rows: int, *, shared: bool) -> list[BatchSlot]:
    """A slot for each row. ``shared``: in memory that a data worker hands to the process that trains without a copy."""
    batch = {}
    for spec in layout:
        if not spec.sparse and spec.path.startswith("tensors/") and spec.row_bytes >= LEAST_BYTES:
            shape = (rows, *spec.shape)
            batch[spec.path] = _shared(shape, spec) if shared else torch.from_numpy(np.empty(shape, spec.numpy_type))
    return [BatchSlot(batch, row) for row in range(rows)]


def collate_rows(rows: Sequence[SlottedRow], layout: Iterable[ArraySpec]) -> Tensors:
    """The arrays of a batch, as ``collate_arrays`` gives them; what was read to this batch's slots is there already."""
    slots = [row.slot for row in rows]
    whole = slots[0].batch if slots[0] is not None else {}
    if any(slot is None or slot.batch is not whole or slot.row != k for k, slot in enumerate(slots)):
        whole = {}
    whole = {path: value for path, value in whole.items() if len(value) == len(rows)}
    return collate_arrays([row.arrays for row in rows], [a for a in layout if a.path not in whole]) | whole


def _shared(shape: tuple[int, ...], spec: ArraySpec) -> Tensor:
    # as torch's own default_collate does it: share_memory_() of a tensor would copy what is in it
    kind: Any = torch.UntypedStorage
    typed = torch.from_numpy(np.empty(0, spec.numpy_type))
    return typed.new_empty(0).set_(kind._new_shared(shape[0] * spec.row_bytes)).view(shape)


def collate_arrays(rows: list[dict[str, NDArray[Any]]], layout: Iterable[ArraySpec]) -> Tensors:
    """Join the arrays of single rows: sparse ones end to end, dense ones stacked."""
    out = {}
    for array in layout:
        if array.path not in rows[0]:
            continue
        parts = [torch.from_numpy(r[array.path]) for r in rows]
        out[array.path] = torch.cat(parts) if array.sparse else torch.stack(parts)
    return out
