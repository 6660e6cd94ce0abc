"""Writes a store: whole shards, checksummed, journalled after the data; a killed run goes on where it stopped.

One process owns a whole shard: two writers in one would mix their files. A shard counts as written when its journal file
names it; the journal file is written (temporary file, fsync, rename, fsync of the folder) after the shard's data are on
the disk.
Nothing in a store depends on the time or the place of writing, so a resumed store is byte for byte an uninterrupted one.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from kdcli.errors import NoSpaceError, StoreError
from kdcli.files import fsync_folder
from kdcli.store.arrays import ZSTD_LEVEL, shard_key
from kdcli.store.checksummed_json import add_checksum
from kdcli.store.journal import journal_bytes, journal_key, read_journal
from kdcli.store.locks import lock_file, remove_stale_locks
from kdcli.store.manifest import ATTRIBUTE
from kdcli.store.schema import StoreSchema
from kdcli.store.shards import pack_chunk, pack_shard
from kdcli.store.storage.base import Storage, Where
from kdcli.store.storage.local import LocalStorage
from kdcli.store.storage.resolve import open_storage


def create_store(where: Where, schema: StoreSchema, manifest: Mapping[str, Any], image_ids: NDArray[np.int64]) -> None:
    """Create an empty store: appears whole or not at all.

    A folder is renamed from one beside it; in an object store the root's zarr.json is put last, by one process alone:
    FileExistsError for the others. ``manifest``: JSON fields that do not change while rows are written; the schema is kept
    beside it.
    """
    storage = open_storage(where)
    if not isinstance(storage, LocalStorage):
        _create_objects(storage, schema, manifest, image_ids)
        return
    path = storage.path
    staging = path.with_name(f".{path.name}.creating")
    shutil.rmtree(staging, ignore_errors=True)
    staging.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_is_an_error(storage):
        try:
            make_arrays(staging, schema, manifest, image_ids)
            (staging / "journal").mkdir()
            for folder, _, _ in os.walk(staging):
                fsync_folder(Path(folder))
            staging.rename(path)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    fsync_folder(path.parent)


def _create_objects(
    storage: Storage, schema: StoreSchema, manifest: Mapping[str, Any], image_ids: NDArray[np.int64]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        staging = Path(folder) / "store"
        make_arrays(staging, schema, manifest, image_ids)
        keys = sorted(f.relative_to(staging).as_posix() for f in staging.rglob("*") if f.is_file())
        keys.remove("zarr.json")
        for key in keys:
            if not storage.create(key, (staging / key).read_bytes()):
                raise StoreError(
                    f"'{storage}/{key}' is of another store, whose making was broken off or goes on now; delete what is "
                    "there, or choose another --out"
                )
        if not storage.create("zarr.json", (staging / "zarr.json").read_bytes()):
            raise FileExistsError(f"'{storage}' was made by another process at this moment")


def make_arrays(target: Any, schema: StoreSchema, manifest: Mapping[str, Any], image_ids: NDArray[np.int64]) -> None:
    """Every array of a store without its shards, in ``target``: what ``zarr.open_group`` takes."""
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
    group.attrs[ATTRIBUTE] = add_checksum({**manifest, "schema": schema.to_json()})


class StoreWriter:
    """Writes whole shards of a store made by ``create_store``; several writers may share a store, not a shard."""

    def __init__(self, where: Where, schema: StoreSchema) -> None:
        self.storage, self.schema = open_storage(where), schema
        if isinstance(self.storage, LocalStorage):
            remove_stale_locks(self.storage.path / "journal")

    def done(self) -> set[int]:
        """Shards that the journal names."""
        return set(read_journal(self.storage))

    def write_shard(self, shard: int, rows: list[dict[str, NDArray[Any]]], measured: Mapping[str, Any]) -> int:
        """Write the rows of ``shard`` and then its journal file; returns the bytes on disk.

        ``rows``: arrays by path, sparse ones unpadded, in row order; ``measured``: JSON, kept in the journal.
        Raises NoSpaceError on a full disk, with the shard's files removed: the finished shards stay. A shard that another
        process has finished meanwhile is left as it is.
        """
        layout = self.schema.layout()
        chunks = {a.path: [pack_chunk(row[a.path], a) for row in rows] for a in layout}
        return self.write_chunks(shard, chunks, measured)

    def write_chunks(self, shard: int, chunks: Mapping[str, list[bytes]], measured: Mapping[str, Any]) -> int:
        """``write_shard`` with the chunks of every array packed already."""
        start, stop = self.schema.shard_range(shard)
        files: dict[str, dict[str, Any]] = {}
        layout = self.schema.layout()
        keys = [shard_key(array, shard) for array in layout]
        with full_disk_is_an_error(self.storage, keys), self._claim(shard) as mine:
            if not mine:
                return 0
            for array, key in zip(layout, keys, strict=True):
                assert len(chunks[array.path]) == stop - start
                data = pack_shard(chunks[array.path], self.schema.shard_rows)
                self.storage.write(key, data)
                files[array.path] = {"bytes": len(data), "crc32c": f"{google_crc32c.value(data):08x}"}
            entry = {"shard": shard, "rows": [start, stop], "files": files, "measured": measured}
            if not self.storage.create(journal_key(shard), journal_bytes(entry)):
                self._give_up(shard)
        return sum(int(f["bytes"]) for f in files.values())

    @contextmanager
    def _claim(self, shard: int) -> Iterator[bool]:
        """Wait until no other process writes ``shard``; False when one has finished it meanwhile.

        Two writers in one shard would leave files of the one beside files of the other, which are not the same bytes when
        their machines round differently.
        """
        if not isinstance(self.storage, LocalStorage):  # no locks there: the journal's own put shows an overlap
            yield not self.storage.has(journal_key(shard))
            return
        with lock_file(self.storage.path / "journal" / f".{shard:06d}.lock"):
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
