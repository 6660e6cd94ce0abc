"""The format of a store, described once: writer, reader, estimate and verify all derive every array from here.

A store is a Zarr v3 group. Each array has one row per (image, view) on its first axis, one chunk per row, and many rows
per shard; sparse arrays are padded to the most that a row can hold, and ``entries/count``, ``boxes/count`` or
``proposals/count`` says how many are real. docs/store-format.md tells the same to people.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcli.errors import GateError, StoreError
from kdcli.geometry.grid import Grid
from kdcli.store.arrays import (
    BOX_COUNT,
    ENTRY_COUNT,
    ZSTD_FAST,
    ZSTD_LEVEL,
    ArraySpec,
    StoredTensor,
    is_flagged,
    path_of,
    whole,
)
from kdcli.store.encodings import ChannelAffine
from kdcli.store.image_codec import PIXEL_ENCODING, PIXELS
from kdcli.store.row_identity import FORMAT_VERSION, LENGTH
from kdcli.structures import Batch, Canvas, Entries
from kdcli.tensors import PROPOSAL_COUNT, Need, Per, Region, Tensors, level_of_per

GEOMETRY_LENGTH = 11  # numbers of data.views.Geometry.to_array
SHARD_BYTES = 128 * 2**20  # raw bytes of one shard over all arrays: what the writer holds in memory
MAX_SHARD_ROWS = 256
ROW_BYTES_LIMIT = 2**31  # no real row comes near; a broken header must not allocate more

MAX_PROPOSALS = 1000  # of a teacher's RPN after NMS; the ground-truth boxes come on top

# entries/* arrays: name -> dtype, one value per sparse entry
ENTRY_DTYPES = {"index": "int32", "flag": "uint8", "gt": "int16", "weight": "float32"}


@dataclass(frozen=True, kw_only=True)
class StoreSchema:
    """Every array of a store, from the grid, the canvas and the needs."""

    grid: Grid
    canvas: Canvas
    rows: int
    shard_rows: int
    tensors: tuple[StoredTensor, ...]
    max_boxes: int = 0  # ground-truth boxes of the row that has most
    derived_from_dense: tuple[Need, ...] = ()  # at entries, and not stored: read from the dense tensor of the same name
    images: bool = False  # the canvases that the teacher saw
    version: int = FORMAT_VERSION  # of the store, whose manifest has it beside the schema

    @cached_property
    def sparse(self) -> bool:
        """True when some tensor is read at the entries of a region."""
        return bool(self.derived_from_dense) or any(t.need.at_entries for t in self.tensors)

    @cached_property
    def regions(self) -> frozenset[str]:
        """The elementary regions that the entries cover, e.g. ``main``, ``vlr``."""
        return regions_of([*(t.need for t in self.tensors), *self.derived_from_dense])

    @cached_property
    def counts(self) -> dict[str, int]:
        """The arrays that count real rows, each with the most that it may say."""
        most = {
            ENTRY_COUNT: self.grid.num_total(self.canvas),
            BOX_COUNT: self.max_boxes,
            PROPOSAL_COUNT: MAX_PROPOSALS + self.max_boxes,
        }
        used = {t.count for t in self.tensors} | ({ENTRY_COUNT} if self.derived_from_dense else set())
        return {path: limit for path, limit in most.items() if path in used}

    @property
    def num_shards(self) -> int:
        """Shards of the whole store."""
        return -(-self.rows // self.shard_rows)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First row and one past the last row of ``shard``."""
        return shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows)

    def sizes(self, tensor: StoredTensor) -> tuple[int, ...]:
        """Allocated rows of ``tensor``, level by level where it has levels."""
        return self._sizes[tensor.need]

    @cached_property
    def _sizes(self) -> dict[Need, tuple[int, ...]]:
        # once for all rows: computing layouts again took a fifth of the time of reading an LD row
        return {t.need: self._sizes_of(t) for t in self.tensors}

    def _sizes_of(self, tensor: StoredTensor) -> tuple[int, ...]:
        cells = tuple(self.grid.level_cells(self.canvas))
        level = level_of_per(tensor.per)
        if level is not None:
            return (cells[level],)
        if tensor.per in (Per.BOX, Per.PROPOSAL):
            return (max(1, self.counts[str(tensor.count)]),)
        return cells if tensor.per == Per.CELL else tuple(self.grid.level_sizes(self.canvas))

    def count(self, tensor: StoredTensor) -> int:
        """Allocated rows of ``tensor``: P, N, the cells of its level, or the most boxes or proposals."""
        return sum(self.sizes(tensor))

    def valid_rows(self, tensor: StoredTensor, valid: Tensor) -> Tensor:
        """Which rows of a dense ``tensor`` are real, of ``valid`` [..., P] cells."""
        if tensor.per == Per.ANCHOR:
            return valid.repeat_interleave(self.grid.num_anchors, dim=-1)
        level = level_of_per(tensor.per)
        return valid if level is None else self.grid.split_levels(valid, self.canvas, dim=-1)[level]

    def tensor_arrays(self, tensor: StoredTensor) -> dict[str, ArraySpec]:
        """Encoding suffix -> array."""
        return self._arrays[tensor.need]

    @cached_property
    def _arrays(self) -> dict[Need, dict[str, ArraySpec]]:
        return {t.need: self._arrays_of(t) for t in self.tensors}

    def _arrays_of(self, tensor: StoredTensor) -> dict[str, ArraySpec]:
        layout = tensor.encoding.layout(self.count(tensor), tensor.dims, self.sizes(tensor))
        fast = tensor.encoding == ChannelAffine(8)  # fewer bits stay a byte each: the entropy coder is what packs them
        return {
            suffix: ArraySpec(
                path_of(tensor.need, suffix),
                shape,
                dtype,
                tensor.count,
                ZSTD_LEVEL if suffix or not fast else ZSTD_FAST,
            )
            for suffix, (shape, dtype) in layout.items()
        }

    def layout(self) -> tuple[ArraySpec, ...]:
        """Every per-row array of the store."""
        return self._layout

    @cached_property
    def _layout(self) -> tuple[ArraySpec, ...]:
        arrays = [
            ArraySpec("row/identity", (LENGTH[self.version],), "uint8"),
            ArraySpec("row/geometry", (GEOMETRY_LENGTH,), "float64"),
        ]
        if self.images:
            arrays.append(ArraySpec(PIXELS, (3, self.canvas.height * self.canvas.width), "uint8"))
        arrays += [ArraySpec(path, (1,), "int32") for path in self.counts]
        if self.sparse:
            anchors = self.grid.num_total(self.canvas)
            arrays += [ArraySpec(f"entries/{n}", (anchors,), d, ENTRY_COUNT) for n, d in ENTRY_DTYPES.items()]
        for tensor in self.tensors:
            arrays += self.tensor_arrays(tensor).values()
        return tuple(arrays)

    def encode(self, values: Mapping[str, NDArray[np.float32]], valid: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
        """Arrays by path of one row; ``values`` by ``Need.key``, ``valid`` [P]. Sparse ones are not padded yet.

        Raises GateError for values that are not finite or do not fit their encoding: 8 bits would hide them.
        """
        arrays = {}
        for tensor in self.tensors:
            mask = self.valid_rows(tensor, torch.from_numpy(valid)).numpy() if tensor.need.dense else None
            key, value = tensor.need.key, values[tensor.need.key]
            if not np.isfinite(value).all():
                raise GateError(
                    f"the teacher gave {key} that is not finite; check its weights, or use --precision fp32"
                )
            with np.errstate(over="ignore", invalid="ignore"):
                codes = tensor.encoding.encode(value, mask, self.sizes(tensor))
            if not all(np.isfinite(code).all() for code in codes.values() if code.dtype.kind == "f"):
                raise GateError(f"the teacher gave {key} beyond 65504, too large for float16; use --encoding lossless")
            arrays.update({path_of(tensor.need, suffix): code for suffix, code in codes.items()})
        return arrays

    def decode(self, arrays: Tensors, needs: Iterable[Need], entries: Entries | None = None) -> Tensors:
        """Float32 teacher tensors by ``Need.key`` from collated arrays by path; with proposals, ``proposals/count`` [B].

        ``entries``: of the batch, for needs that a dense tensor serves.
        """
        wanted = set(needs)
        out = {}
        if PROPOSAL_COUNT in arrays:
            out[PROPOSAL_COUNT] = arrays[PROPOSAL_COUNT].flatten().long()
        for tensor in self.tensors:
            derived = [
                n for n in wanted if n in self.derived_from_dense and n.name == tensor.need.name and tensor.need.dense
            ]
            if tensor.need not in wanted and not derived:
                continue
            parts = {suffix: arrays[a.path] for suffix, a in self.tensor_arrays(tensor).items()}
            value = tensor.encoding.decode(parts, self.sizes(tensor))
            if tensor.need in wanted:
                out[tensor.need.key] = value
            for need in derived:
                assert entries is not None
                mine = entries.select(need.region)
                row = entries.index[mine] // (1 if tensor.per == Per.ANCHOR else self.grid.num_anchors)
                out[need.key] = value[entries.image[mine], row]
        return out

    def decode_batch(self, batch: Batch, needs: Iterable[Need]) -> Tensors:
        """``decode`` of the rows that came with ``batch``, on its device: the teacher's tensors without the teacher."""
        return self.decode(batch.rows, needs, batch.entries)

    def restrict(self, needs: Iterable[Need]) -> tuple[StoredTensor, ...]:
        """The stored tensors that ``needs`` read, each once. Raises StoreError listing what is missing."""
        have = {t.need: t for t in self.tensors}
        have |= {n: have[Need(n.name, Region.ALL)] for n in self.derived_from_dense if Need(n.name, Region.ALL) in have}
        missing = [n.key for n in needs if n not in have]
        if missing:
            raise StoreError(f"the store lacks {', '.join(missing)}; it has {', '.join(n.key for n in have)}")
        return tuple(dict.fromkeys(have[n] for n in needs))

    def to_json(self) -> dict[str, Any]:
        """JSON form, kept in the attributes of the Zarr group."""
        return {
            "grid": self.grid.to_json(),
            "canvas": str(self.canvas),
            "rows": self.rows,
            "shard_rows": self.shard_rows,
            "tensors": [t.to_json() for t in self.tensors],
            "max_boxes": self.max_boxes,
            "served": [n.key for n in self.derived_from_dense],
            **({"images": PIXEL_ENCODING} if self.images else {}),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], version: int = FORMAT_VERSION) -> StoreSchema:
        """Inverse of ``to_json``. Raises StoreError when a field is missing, of the wrong kind or beyond the bounds."""
        try:
            schema = StoreSchema(
                grid=Grid.from_json(data["grid"], complete=True),
                canvas=Canvas.parse(data["canvas"]),
                rows=whole(data["rows"]),
                shard_rows=whole(data["shard_rows"]),
                tensors=tuple(StoredTensor.from_json(t) for t in data["tensors"]),
                max_boxes=whole(data["max_boxes"], 0),
                derived_from_dense=tuple(Need(*str(key).split("@")) for key in data["served"]),
                images=_images(data.get("images")),
                version=version,
            )
            arrays = schema.layout()
            for size in (n for a in arrays for n in a.shape):
                whole(size)
            for stride in schema.grid.strides:
                whole(stride)
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(
                f"the store's schema cannot be read ({repr(error)[:200]}); write the store again"
            ) from error
        if not (schema.rows < 2**40 and schema.shard_rows <= 2**20 and schema.max_boxes <= 2**20):
            raise StoreError(f"the store's schema is impossible: {schema.rows} rows, {schema.shard_rows} rows a shard")
        stored = {t.need for t in schema.tensors}
        if not (stored or schema.derived_from_dense or schema.images) or len(stored) < len(schema.tensors):
            raise StoreError("the store's schema is impossible: no tensor, or one tensor twice")
        if len(set(schema.derived_from_dense)) < len(schema.derived_from_dense):
            raise StoreError("the store's schema is impossible: one tensor is served twice")
        for need in schema.derived_from_dense:
            if need in stored or not is_flagged(need.region):
                raise StoreError(f"the store's schema is impossible: {need.key} cannot be served")
        for array in arrays:
            if array.row_bytes > ROW_BYTES_LIMIT:
                raise StoreError(f"the store's schema is impossible: {array.path} has {array.row_bytes} bytes a row")
        return schema


def regions_of(needs: Iterable[Need]) -> frozenset[str]:
    """The elementary regions that ``needs`` read at entries."""
    return frozenset(part for n in needs if n.at_entries for part in n.region.split("+"))


def row_tensor(value: Tensor) -> NDArray[np.float32]:
    """Float32 numpy copy of a tensor on any device."""
    result: NDArray[np.float32] = value.detach().float().cpu().numpy()
    return result


def _images(encoding: Any) -> bool:
    """Whether a schema names an encoding of images. Raises StoreError for one that is not known here."""
    if encoding not in (None, PIXEL_ENCODING):
        raise StoreError(f"unknown encoding of images {str(encoding)[:40]!r}; this store was written by a newer kdcli")
    return encoding is not None
