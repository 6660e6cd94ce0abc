"""The bytes of a standard Zarr v3 shard file, packed and read without zarr-python.

A shard file holds its chunks one after another and ends in an index: for each chunk its offset and length (two
little-endian uint64), then the crc32c of the index. A chunk is one row: a zstd frame, then the crc32c of it. zarr-python
reads the same files and is the judge in tests; it needs 26 times as long for the LD rows of docs/results/bccd.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from kdcli.cache.places import Place
from kdcli.errors import StoreError

ZSTD_LEVEL = 1  # codes hardly compress; what zstd is for is the padding behind sparse rows
MISSING = 2**64 - 1  # of a shard index: this chunk was never written


def pack_chunk(value: NDArray[Any], shape: Sequence[int], dtype: str) -> bytes:
    """The chunk of one row: ``value`` in the first rows of a zero array of ``shape``, compressed and checksummed."""
    row = np.zeros(shape, np.dtype(dtype).newbyteorder("<"))
    row[: len(value)] = value
    frame: bytes = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(row.data)
    return frame + _crc(frame)


def pack_shard(chunks: Sequence[bytes | None], size: int) -> bytes:
    """A shard file of ``size`` chunks; None, and what ``chunks`` lacks at the end, is a chunk that was never written."""
    index = np.full((size, 2), MISSING, "<u8")
    offset = 0
    for position, chunk in enumerate(chunks):
        if chunk is not None:
            index[position] = offset, len(chunk)
            offset += len(chunk)
    tail = index.tobytes()
    return b"".join([*(c for c in chunks if c is not None), tail, _crc(tail)])


class ShardFile:
    """Random access to the chunks of one shard file; its index is read once.

    Raises StoreError for a file that is missing, or an index that fails its checksum.
    """

    def __init__(self, place: Place, key: str, chunks: int) -> None:
        self._name = f"{place}/{key}"
        tail = 16 * chunks + 4
        try:
            self._file = place.open(key)
            self._size = self._file.size
            index = self._file.read(max(0, self._size - tail), tail)
        except FileNotFoundError as error:
            raise self._corrupt("is missing") from error
        if len(index) != tail or _crc(index[:-4]) != index[-4:]:
            raise self._corrupt("has a broken index")
        self._index = np.frombuffer(index[:-4], dtype="<u8").reshape(chunks, 2)

    def chunk(self, position: int) -> bytes:
        """The stored bytes of a chunk, its checksum included. Raises StoreError when they are not what was written."""
        offset, length = (int(v) for v in self._index[position])
        if offset == MISSING or length < 4 or offset + length > self._size:
            raise self._corrupt(f"has no data for its row {position}")
        chunk = self._file.read(offset, length)
        if _crc(chunk[:-4]) != chunk[-4:]:
            raise self._corrupt(f"fails the checksum of its row {position}")
        return chunk

    def read(self, position: int, size: int, full_size: int) -> bytes:
        """The first ``size`` decompressed bytes of a chunk of ``full_size``. Raises StoreError as ``chunk`` does."""
        chunk = self.chunk(position)
        if size == 0:
            return b""
        if zstandard.frame_content_size(chunk) != full_size:
            raise self._corrupt(f"holds {zstandard.frame_content_size(chunk)} bytes instead of {full_size}")
        if size * 4 > full_size:
            return zstandard.ZstdDecompressor().decompress(chunk[:-4])[:size]
        # a padded row: stop after the real entries, the zeros behind them are most of it
        with zstandard.ZstdDecompressor().stream_reader(memoryview(chunk)[:-4]) as stream:
            data: bytes = stream.read(size)
        return data

    def _corrupt(self, what: str) -> StoreError:
        return StoreError(f"shard file '{self._name}' {what}; run `kdcli cache verify`, then write the store again")


def _crc(data: bytes) -> bytes:
    value: int = google_crc32c.value(data)
    return value.to_bytes(4, "little")
