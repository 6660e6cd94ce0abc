"""Reads rows of a store, by key, straight from its shard files: one read, one checksum and one decompression per array.

The chunks of a row are asked for together, as an object store answers them side by side.
``direct=False`` reads through zarr-python, and its ``zarrs`` pipeline where that is installed: the judge in tests.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from kdcli.errors import KDError, StoreError
from kdcli.store.arrays import ENTRY_COUNT, ArraySpec, shard_key
from kdcli.store.batch_buffers import BatchSlot, allocate_batch
from kdcli.store.checksums import crc_is_right
from kdcli.store.image_codec import PIXELS, decode_pixels
from kdcli.store.journal import ShardRecord, journal_key, read_journal
from kdcli.store.manifest import read_manifest
from kdcli.store.row_identity import CONTENT, GUARD, is_of
from kdcli.store.schema import ENTRY_DTYPES
from kdcli.store.shards import ShardFile, corrupt, decompress, open_shards, read_chunks
from kdcli.store.storage.base import Where
from kdcli.store.storage.resolve import open_storage
from kdcli.store.validation import check_readable
from kdcli.structures import FLAGS, Entries, RowKey, flag_bits
from kdcli.tensors import PROPOSAL_COUNT, Need
from kdcli.untrusted import parse_json

ADDING = ".adding"  # inside a store, of ``cache add``: same disk, and gone with it
TRIES = 50  # to open a shard that is being replaced, 0.1 s apart: it takes some renames
_Chunks = dict[str, tuple[ShardFile, bytes]]  # by array path
_UNKNOWN = np.uint8(255 - sum(FLAGS.values()))  # bits that no region has


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stored row: arrays by path (sparse ones cut to their real length) and what ties it to its image."""

    arrays: dict[str, NDArray[Any]]
    entries: Entries | None
    content: bytes  # sha256 of the image file
    guard: bytes  # of boxes, labels and region definition
    geometry: NDArray[np.float64]
    image: NDArray[np.uint8] | None = None  # [3, H, W], the canvas; None: the store has none
    slot: BatchSlot | None = None  # that the large dense arrays are in


class StoreReader:
    """Rows of the store at ``where``, restricted to what ``needs`` read (None: everything).

    Cheap to pickle: files are opened by the process that reads. ``direct=False`` reads through zarr-python.
    Raises MissingPathError or StoreError for a store that is missing, foreign, unfinished, or lacks a need.
    """

    def __init__(self, where: Where, needs: Iterable[Need] | None = None, *, direct: bool = True) -> None:
        self.storage, self.direct = open_storage(where), direct
        self.manifest = read_manifest(self.storage)
        self.schema = self.manifest.schema
        try:
            check_readable(self.schema)
        except ValueError as error:
            raise StoreError(f"store '{self.storage}' has {error}; write the store again") from error
        self.tensors = self.schema.tensors if needs is None else self.schema.restrict(tuple(needs))
        self.views = self.manifest.views
        self.records = self._read_records()
        self._ids = self._read_image_ids()
        self._sorter = np.argsort(self._ids, kind="stable")  # 16 bytes an image; a dict would take 130
        self.pixels = self.schema.images
        self.layout = self._wanted()
        self._shards: dict[int, list[ShardFile]] = {}  # of each shard that is open, in the order of the layout
        self._group: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}, "_group": None}

    def restricted(self, needs: Iterable[Need], *, pixels: bool) -> StoreReader:
        """The same store read for less: what ``needs`` read, with its cached images or not. Nothing is opened or read.

        Raises StoreError when it lacks a need.
        """
        other = copy.copy(self)  # through __getstate__: with no open file
        other.tensors = self.schema.restrict(tuple(needs))
        other.pixels = pixels and self.schema.images
        other.layout = other._wanted()
        return other

    @property
    def image_ids(self) -> tuple[int, ...]:
        """The images, in the order of their rows."""
        return tuple(self._ids.tolist())

    def row_index(self, key: RowKey) -> int:
        """Position of a row. Raises StoreError when the image or the view was not cached."""
        if key.view not in self.views:
            raise StoreError(f"store '{self.storage}' has no view '{key.view}'; it has {', '.join(self.views)}")
        at = int(np.searchsorted(self._ids, key.image_id, sorter=self._sorter))
        position = int(self._sorter[at]) if at < len(self._ids) else -1
        if position < 0 or self._ids[position] != key.image_id:
            why = (
                "it was left out when the store was written; train with the same --skip-bad, or write the store again"
                if key.image_id in self.manifest.dataset.left_out
                else "its data set had no such image id"
            )
            raise StoreError(f"store '{self.storage}' has no row for image {key.image_id}: {why}")
        return position * len(self.views) + self.views.index(key.view)

    def read_all(self, keys: Sequence[RowKey], *, shared: bool = False) -> list[Row]:
        """The rows of a batch, in ``shared`` memory or not. Raises StoreError as ``read`` does."""
        slots = allocate_batch(self.layout.values(), len(keys), shared=shared)
        return [self.read(key, slot) for key, slot in zip(keys, slots, strict=True)]

    def read(self, key: RowKey, slot: BatchSlot | None = None) -> Row:
        """The row of ``key``; large dense arrays in ``slot``. Raises StoreError when it is missing or fails a checksum."""
        index = self.row_index(key)
        chunks = self._fetch(index) if self.direct else {}
        counts = {}
        for path, most in self.schema.counts.items():
            counts[path] = int(self._array(chunks, path, index, None)[0])
            if not 0 <= counts[path] <= most:
                raise StoreError(
                    f"store '{self.storage}', {key}: impossible {path} {counts[path]}; run `kdcli cache verify`"
                )
        parts = self._entry_parts(chunks, index, counts[ENTRY_COUNT]) if self.schema.sparse else {}
        arrays = {}
        for tensor in self.tensors:
            length = None if tensor.count is None else counts[tensor.count]
            if tensor.need.at_entries:
                # in numpy: with the two tensors of LD a row of 800x1344 was read in 0.39 ms instead of 0.41
                length = int(np.count_nonzero(parts["flag"] & flag_bits(tensor.need.region)))
            for spec in self.schema.tensor_arrays(tensor).values():
                out = None if slot is None else slot.of(spec.path)
                arrays[spec.path] = self._array(chunks, spec.path, index, length, out)
            if tensor.count == PROPOSAL_COUNT:  # the boxes of each image are counted by its targets, proposals are not
                arrays[PROPOSAL_COUNT] = np.array([counts[PROPOSAL_COUNT]], np.int32)
        identity = self._array(chunks, "row/identity", index, None).tobytes()
        if not is_of(identity, key):
            raise StoreError(
                f"store '{self.storage}', {key}: its row is of another image or view; run `kdcli cache verify`"
            )
        geometry = self._array(chunks, "row/geometry", index, None)
        image = self._image(chunks, index, geometry) if self.pixels else None
        entries = _entries_of(parts) if parts else None
        return Row(
            arrays=arrays, entries=entries, content=identity[CONTENT], guard=identity[GUARD], geometry=geometry, image=image,
            slot=slot,
        )  # fmt: skip

    def shard_of(self, key: RowKey) -> int:
        """The shard that the row of ``key`` is in. Raises StoreError as ``row_index`` does."""
        return self.row_index(key) // self.schema.shard_rows

    def bytes_on_disk(self) -> int:
        """Bytes of all shard files, from the journal."""
        return sum(file.size for files in self.records for file in files.values())

    def _wanted(self) -> dict[str, ArraySpec]:
        specs = {a.path: a for a in self.schema.layout() if not a.path.startswith("tensors/")}
        if not self.pixels:
            specs.pop(PIXELS, None)
        for tensor in self.tensors:
            specs.update({a.path: a for a in self.schema.tensor_arrays(tensor).values()})
        return specs

    def _read_records(self) -> list[Mapping[str, ShardRecord]]:
        """Of each shard, what its files have to be, by array path. Raises StoreError when shards or files are missing."""
        journal = read_journal(self.storage, self.manifest)
        done = len(journal)
        for shard, entry in journal.items():
            if shard >= self.schema.num_shards or entry.rows != self.schema.shard_range(shard):
                raise StoreError(
                    f"store '{self.storage}': its journal file of shard {shard} is of another store; write the store again"
                )
        if done != self.schema.num_shards:
            raise StoreError(
                f"store '{self.storage}' is incomplete: {done} of {self.schema.num_shards} shards are written; "
                "run the same cache-teacher command again to finish it"
            )
        records = [journal[shard].files for shard in range(done)]
        arrays = [array.path for array in self.schema.layout()]
        for shard, path in ((s, p) for s, files in enumerate(records) for p in arrays if p not in files):
            raise StoreError(
                f"store '{self.storage}': its journal does not name the file of {path} in shard {shard}; delete "
                f"'{self.storage}/{journal_key(shard)}' and run the same cache-teacher command again"
            )
        return records

    def _read_image_ids(self) -> NDArray[np.int64]:
        count = self.schema.rows // len(self.views)
        try:
            header, chunk = self.storage.read_all(["image_id/zarr.json", "image_id/c/0"])
            document = parse_json(header)
            codecs = [codec["name"] for codec in document["codecs"]]
            kind = (document["shape"], document["data_type"], codecs)
            if kind != ([count], "int64", ["bytes", "zstd", "crc32c"]) or not crc_is_right(chunk):
                raise ValueError("another header, or a wrong checksum")
            array = ArraySpec("image_id", (count,), "int64")
            ids: NDArray[np.int64] = decompress(memoryview(chunk)[:-4], array, array.shape)
        except (LookupError, ValueError, TypeError, OSError) as error:
            if isinstance(error, KDError):
                raise
            raise StoreError(f"store '{self.storage}': its image_id array is corrupt; write the store again") from error
        if len(ids) * len(self.views) != self.schema.rows or len(np.unique(ids)) != len(ids):
            raise StoreError(
                f"store '{self.storage}': its image_id array does not name the images of {self.schema.rows} rows in "
                f"{len(self.views)} views; write the store again"
            )
        return ids

    def _fetch(self, index: int) -> _Chunks:
        """The chunks of row ``index``, one of each array that is wanted, checked."""
        shard, position = divmod(index, self.schema.shard_rows)
        files = self._shards.get(shard)
        if files is None:
            files = self._shards[shard] = self._open(shard)
            most = max(1, self.storage.max_open // len(files))
            for first in list(self._shards)[:-most]:  # opened first; reads are random anyway
                self._shards.pop(first, None)  # other threads open and close files too
        data = read_chunks(self.storage, [(file, position) for file in files])
        return dict(zip(self.layout, zip(files, data, strict=True), strict=True))

    def _open(self, shard: int) -> list[ShardFile]:
        """The files of a shard. Raises StoreError for one that the journal does not name: of another shard or store.

        ``cache add`` replaces the arrays of entries, with more of them, and then the journal file, under readers at work.
        """
        keys = [shard_key(spec, shard) for spec in self.layout.values()]
        for tried in range(TRIES):
            files = open_shards(self.storage, keys, self.schema.shard_rows)
            pairs = zip(files, self.layout, strict=True)
            other = [file for file, path in pairs if not file.is_of(self.records[shard][path])]
            if not other:
                return files
            if tried:
                if not self.storage.has(f"{ADDING}/zarr.json"):
                    raise corrupt(other[0].name, "is not the one that the journal names")
                time.sleep(0.1)
            self.records = self._read_records()
        raise StoreError(f"store '{self.storage}' has an unfinished `cache add`; run that again to its end")

    def _entry_parts(self, chunks: _Chunks, index: int, count: int) -> dict[str, NDArray[Any]]:
        """``entries/*`` of a row, by name. Raises StoreError for what no row can have."""
        parts = {name: self._array(chunks, f"entries/{name}", index, count) for name in ENTRY_DTYPES}
        if count and np.bitwise_or.reduce(parts["flag"]) & _UNKNOWN:
            raise StoreError(
                f"store '{self.storage}', row {index}: unknown region flag; it was written by a newer kdcli"
            )
        at, anchors = parts["index"], self.layout["entries/index"].shape[0]
        if count and (at[0] < 0 or at[-1] >= anchors or (at[1:] <= at[:-1]).any()):
            raise StoreError(f"store '{self.storage}', row {index}: impossible entries/index; run `kdcli cache verify`")
        return parts

    def _image(self, chunks: _Chunks, index: int, geometry: NDArray[np.float64]) -> NDArray[np.uint8]:
        given, turned = self.schema.canvas.size, self.schema.canvas.transposed.size
        if tuple(geometry[-2:]) not in (given, turned):
            raise StoreError(f"store '{self.storage}', row {index}: impossible canvas; run `kdcli cache verify`")
        size = given if tuple(geometry[-2:]) == given else turned
        return decode_pixels(self._array(chunks, PIXELS, index, None), size)

    def _array(
        self, chunks: _Chunks, path: str, index: int, length: int | None, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Row ``index`` of an array, its first ``length`` entries (None: all). Writable: ``out``, or a fresh one."""
        spec = self.layout[path]
        shape = spec.shape if length is None else (length, *spec.shape[1:])
        if shape[0] > spec.shape[0]:
            raise StoreError(
                f"store '{self.storage}', row {index}: {length} entries, and {path} has room for {spec.shape[0]}; write the "
                "store again"
            )
        if self.direct:
            file, chunk = chunks[path]
            return file.unpack(chunk, spec, shape, out)
        if self._group is None:  # a truth test of a group lists all its members
            self._group = zarr.open_group(self.storage.for_zarr(), mode="r")
        with zarr.config.set(self.storage.zarr_config):
            value: NDArray[Any] = np.array(self._group[path][index])
        return value[:length]


def _entries_of(parts: Mapping[str, NDArray[Any]]) -> Entries:
    index, gt = parts["index"].astype(np.int64), parts["gt"].astype(np.int64)
    return Entries(
        index=torch.from_numpy(index),
        flag=torch.from_numpy(parts["flag"]),
        gt=torch.from_numpy(gt),
        weight=torch.from_numpy(parts["weight"]),
        image=torch.from_numpy(np.zeros_like(index)),
    )
