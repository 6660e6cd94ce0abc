"""Writes a store: whole shards, checksummed, journalled after the data; a killed run goes on where it stopped.

One process owns a whole shard: two writers in one would mix their files. A shard counts as written when its journal file
names it; the journal file is written (temporary file, fsync, rename, fsync of the folder) after the shard's data are on
the disk.
Nothing in a store depends on the time or the place of writing, so a resumed store is byte for byte an uninterrupted one.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from kdcli.errors import NoSpaceError, StoreError
from kdcli.store.arrays import ZSTD_LEVEL, shard_key
from kdcli.store.checksummed_json import add_checksum
from kdcli.store.encoding_error import Measured
from kdcli.store.journal import JournalEntry, ShardRecord, journal_key, read_journal
from kdcli.store.manifest import ATTRIBUTE, Manifest, read_manifest
from kdcli.store.schema import StoreSchema
from kdcli.store.shards import pack_chunk, pack_shard
from kdcli.store.storage.base import Storage, Where
from kdcli.store.storage.resolve import open_storage


def create_store(where: Where, manifest: Manifest, image_ids: NDArray[np.int64]) -> bool:
    """Create an empty store of ``manifest``: it appears whole or not at all. See ``Storage.create_store``.

    ``image_ids``: [images] in the order of the rows. Raises NoSpaceError on a full disk.
    """
    storage = open_storage(where)

    def fill(folder: Path) -> None:
        make_arrays(folder, manifest.schema, image_ids).attrs[ATTRIBUTE] = add_checksum(manifest.to_json())
        (folder / "journal").mkdir()

    with full_disk_is_an_error(storage):
        return storage.create_store(fill)


def make_arrays(target: Any, schema: StoreSchema, image_ids: NDArray[np.int64]) -> zarr.Group:
    """A root group with every array of a store, without shards, in ``target``: what ``zarr.open_group`` takes."""
    group = zarr.open_group(target, mode="w", zarr_format=3)
    for array in schema.layout():
        group.create_array(
            name=array.path,
            shape=(schema.rows, *array.shape),
            chunks=(1, *array.shape),
            shards=(schema.shard_rows, *array.shape),
            dtype=array.dtype,
            # crc32c last: it guards the compressed bytes, so a flipped bit is found before decoding
            compressors=[ZstdCodec(level=array.level), Crc32cCodec()],
            filters=None,
            fill_value=0,
        )
    ids = group.create_array(
        name="image_id",
        shape=image_ids.shape,
        chunks=image_ids.shape,
        dtype="int64",
        compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
        config={"write_empty_chunks": True},  # one image with id 0 would leave no file
    )
    ids[:] = image_ids
    return group


class StoreWriter:
    """Writes whole shards of a store made by ``create_store``; several writers may share a store, not a shard."""

    def __init__(self, where: Where, schema: StoreSchema) -> None:
        self.storage, self.schema = open_storage(where), schema
        self.store = None if schema.version == 1 else read_manifest(self.storage).binding
        self.storage.remove_stale_locks("journal")

    def done(self) -> set[int]:
        """Shards that the journal names."""
        return set(read_journal(self.storage))

    def write_shard(self, shard: int, rows: list[dict[str, NDArray[Any]]], measured: Measured) -> int:
        """Write the rows of ``shard`` and then its journal file; returns the bytes on disk.

        ``rows``: arrays by path, sparse ones unpadded, in row order; ``measured``: sums over them, kept in the journal.
        Raises NoSpaceError on a full disk, with the shard's files removed: the finished shards stay. A shard that another
        process has finished meanwhile is left as it is.
        """
        layout = self.schema.layout()
        chunks = {a.path: [pack_chunk(row[a.path], a) for row in rows] for a in layout}
        return self.write_chunks(shard, chunks, measured)

    def write_chunks(self, shard: int, chunks: Mapping[str, list[bytes]], measured: Measured) -> int:
        """``write_shard`` with the chunks of every array packed already."""
        start, stop = self.schema.shard_range(shard)
        files: dict[str, ShardRecord] = {}
        layout = self.schema.layout()
        keys = [shard_key(array, shard) for array in layout]
        with full_disk_is_an_error(self.storage, keys), self._claim(shard) as mine:
            if not mine:
                return 0
            for array, key in zip(layout, keys, strict=True):
                assert len(chunks[array.path]) == stop - start
                data = pack_shard(chunks[array.path], self.schema.shard_rows)
                self.storage.write(key, data)
                files[array.path] = ShardRecord.of(data, self.schema.version)
            entry = JournalEntry(shard=shard, rows=(start, stop), files=files, measured=measured, store=self.store)
            if not self.storage.create(journal_key(shard), entry.to_bytes()):
                self._give_up(shard)
        return sum(file.size for file in files.values())

    @contextmanager
    def _claim(self, shard: int) -> Iterator[bool]:
        """Wait until no other process writes ``shard``; False when one has finished it meanwhile.

        Two writers in one shard would leave files of the one beside files of the other, which are not the same bytes when
        their machines round differently.
        """
        with self.storage.lock_file(f"journal/.{shard:06d}.lock"):
            yield not self.storage.has(journal_key(shard))

    def _give_up(self, shard: int) -> None:
        """Another process has journalled this shard while we wrote it, with other bytes: some of the files are ours."""
        self.storage.delete(journal_key(shard))
        raise StoreError(
            f"shard {shard} of '{self.storage}' was written by two processes at the same time, with other numbers; it counts "
            "as not written: run the same command again, each part once"
        )


@contextmanager
def full_disk_is_an_error(storage: Storage, remove: Sequence[str] = ()) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT into NoSpaceError, removing the files that would be half-written."""
    try:
        yield
    except OSError as error:
        if not isinstance(error, NoSpaceError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        for key in remove:
            storage.delete(key)
        raise NoSpaceError(
            f"no space left on the disk of '{storage}'; the finished shards are kept: free some space and run the same "
            "command again, it goes on from there"
        ) from error
