"""The bytes of a standard Zarr v3 shard file, packed and read without zarr-python.

A shard file holds its chunks one after another and ends in an index: for each chunk its offset and length (two
little-endian uint64), then the crc32c of the index. A chunk is one row: a zstd frame, then the crc32c of it. zarr-python
reads the same files and is the judge in tests; it needs 26 times as long for the LD rows of docs/results/bccd.md.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from kdcli.errors import StoreError
from kdcli.store.arrays import ArraySpec
from kdcli.store.checksums import crc_bytes, crc_is_right
from kdcli.store.journal import ShardRecord
from kdcli.store.storage.base import OpenFile, Storage

MISSING = 2**64 - 1  # of a shard index: this chunk was never written
_ZEROS = memoryview(bytes(2**20))
_PLACE = struct.Struct("<QQ")  # of a chunk in its shard file: offset, length
_TWO_PLACES = struct.Struct("<QQQQ")


class _Contexts(threading.local):
    """zstd's, some for each thread, as no two may use one: to make one takes 13 to 16 us, to decompress 48 bytes 1 us."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()
        self._compressors: dict[int, zstandard.ZstdCompressor] = {}

    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        if level not in self._compressors:
            self._compressors[level] = zstandard.ZstdCompressor(level=level)
        return self._compressors[level]


_CONTEXTS = _Contexts()


def pack_chunk(value: NDArray[Any], array: ArraySpec) -> bytes:
    """The chunk of one row of ``array``: ``value`` in its first rows, then zeros, compressed and checksummed.

    The zeros at its end start a block of their own, so that who wants what is before them decompresses nothing else: a zstd
    block is up to 128 kB, and an LD row of 800x1344 is read in a tenth less time. Where they start follows from the contents,
    not from ``value``'s length.
    """
    raw = np.ascontiguousarray(value, array.numpy_type)
    compressor = _CONTEXTS.compressor(array.level)
    if not array.sparse:
        if len(raw) < array.shape[0]:
            raw = np.concatenate([raw, np.zeros_like(raw, shape=(array.shape[0] - len(raw), *array.shape[1:]))])
        frame: bytes = compressor.compress(raw.data)
        return frame + crc_bytes(frame)
    stride = array.row_bytes // array.shape[0]
    real = -(-len(raw.tobytes().rstrip(b"\0")) // stride)
    stream = compressor.compressobj(size=array.row_bytes)
    parts = []
    if real:
        parts += [stream.compress(raw[:real].data), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    left = array.row_bytes - real * stride
    while left:
        parts.append(stream.compress(_ZEROS[:left]))
        left -= min(left, len(_ZEROS))
    parts.append(stream.flush())
    frame = b"".join(parts)
    return frame + crc_bytes(frame)


def pack_shard(chunks: Sequence[bytes | None], size: int) -> bytes:
    """A shard file of ``size`` chunks; None, and what ``chunks`` lacks at the end, is a chunk that was never written."""
    index = np.full((size, 2), MISSING, "<u8")
    offset = 0
    for position, chunk in enumerate(chunks):
        if chunk is not None:
            index[position] = offset, len(chunk)
            offset += len(chunk)
    tail = index.tobytes()
    return b"".join([*(c for c in chunks if c is not None), tail, crc_bytes(tail)])


class ShardFile:
    """The chunks of one open shard file; its index is read once. Raises StoreError for one that fails its checksum."""

    def __init__(self, name: str, file: OpenFile, chunks: int) -> None:
        self.file = file
        self.name = name
        if len(file.tail) != _index_bytes(chunks) or not crc_is_right(file.tail):
            raise corrupt(name, "has a broken index")

    def is_of(self, record: ShardRecord) -> bool:
        """Whether size and index are those of the journal. The digest of all its bytes is for `cache verify`."""
        return self.file.size == record.size and record.index in (None, self.file.tail[-4:].hex())

    def where(self, position: int) -> tuple[int, int]:
        """Offset and length of a chunk. Raises StoreError for one that was never written, or is not behind the one before."""
        index, before, before_length = self.file.tail, 0, 0
        if position:
            before, before_length, offset, length = _TWO_PLACES.unpack_from(index, 16 * position - 16)
        else:
            offset, length = _PLACE.unpack_from(index)
        if offset != before + before_length or length < 4 or offset + length > self.file.size - len(index):
            raise corrupt(self.name, f"has no data for its row {position}")
        return offset, length

    def unpack(
        self, chunk: bytes, array: ArraySpec, shape: tuple[int, ...], out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """The first values of a checked chunk of ``array``, of ``shape``: ``out``, or a fresh array.

        Raises StoreError for the chunk of another array.
        """
        try:
            return decompress(memoryview(chunk)[:-4], array, shape, out)
        except ValueError as error:
            raise corrupt(self.name, f"holds {error} instead of {array.row_bytes} bytes") from error


def open_shards(storage: Storage, keys: Sequence[str], chunks: int) -> list[ShardFile]:
    """Open shard files of ``chunks`` chunks. Raises StoreError for one that is missing or has a broken index."""
    opened = []
    for key, file in zip(keys, storage.open_all(keys, _index_bytes(chunks)), strict=True):
        if file is None:
            raise corrupt(f"{storage}/{key}", "is missing")
        opened.append(ShardFile(f"{storage}/{key}", file, chunks))
    return opened


def read_chunks(storage: Storage, wanted: Sequence[tuple[ShardFile, int]]) -> list[bytes]:
    """The stored bytes of chunks, their checksums included. Raises StoreError when they are not what was written."""
    ranges = [(shard.file, *shard.where(position)) for shard, position in wanted]
    data = storage.read_ranges(ranges)
    for (shard, position), chunk in zip(wanted, data, strict=True):
        if not crc_is_right(chunk):
            raise corrupt(shard.name, f"fails the checksum of its row {position}")
    return data


def decompress(
    frame: bytes | memoryview, array: ArraySpec, shape: tuple[int, ...], out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """The first values of the zstd frame of a row of ``array``, of ``shape``: ``out``, or a fresh array.

    A padded row ends after its real entries: the zeros behind them are most of it. Raises ValueError, saying what the frame
    holds, for another.
    """
    try:
        found = zstandard.frame_content_size(frame)
        if found != array.row_bytes:  # before any of it is allocated
            raise ValueError(f"{found} bytes")
        value: NDArray[Any] = np.empty(shape, array.numpy_type) if out is None else out
        count = _CONTEXTS.decompressor.stream_reader(frame).readinto(value) if value.size else 0
    except zstandard.ZstdError as error:
        raise ValueError("no whole zstd frame") from error
    if count != value.nbytes:
        raise ValueError(f"{count} bytes")
    return value


def _index_bytes(chunks: int) -> int:
    return 16 * chunks + 4


def corrupt(name: str, what: str) -> StoreError:
    """The error for a shard file: ``what`` is wrong with it."""
    return StoreError(f"shard file '{name}' {what}; run `kdcli cache verify`, then write the store again")
