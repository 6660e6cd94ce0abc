"""Writes a store: whole shards, checksummed, journalled after the data; a killed run goes on where it stopped.

One process owns a whole shard: two writers in one would mix their files. A shard counts as written when its journal file
names it; the journal file is written (temporary file, fsync, rename, fsync of the folder) after the shard's data are on
the disk.
Nothing in a store depends on the time or the place of writing, so a resumed store is byte for byte an uninterrupted one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from kdcli.cache.locks import hold_file
from kdcli.cache.places import Folder
from kdcli.cache.schema import ArraySpec, CacheSchema, digest
from kdcli.cache.shards import ZSTD_LEVEL, pack_chunk, pack_shard
from kdcli.errors import MissingPathError, NoSpaceError, StoreError
from kdcli.files import fsync_folder

ATTRIBUTE = "kdcli"


def create_store(path: Path, schema: CacheSchema, manifest: Mapping[str, Any], image_ids: NDArray[np.int64]) -> None:
    """Create an empty store at ``path``: appears whole (rename of a folder beside it) or not at all.

    ``manifest``: JSON fields that do not change while rows are written; the schema is kept beside it.
    """
    staging = path.with_name(f".{path.name}.creating")
    shutil.rmtree(staging, ignore_errors=True)
    staging.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_is_an_error(path):
        try:
            group = zarr.open_group(staging, mode="w", zarr_format=3)
            for array in schema.layout():
                group.create_array(
                    name=array.path,
                    shape=(schema.rows, *array.shape),
                    chunks=(1, *array.shape),
                    shards=(schema.shard_rows, *array.shape),
                    dtype=array.dtype,
                    # crc32c last: it guards the compressed bytes, so a flipped bit is found before decoding
                    compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
                    filters=None,
                    fill_value=0,
                )
            ids = group.create_array(
                name="image_id",
                shape=image_ids.shape,
                chunks=image_ids.shape,
                dtype="int64",
                compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
            )
            ids[:] = image_ids
            group.attrs[ATTRIBUTE] = {**manifest, "schema": schema.to_json()}
            (staging / "journal").mkdir()
            for folder, _, _ in os.walk(staging):
                fsync_folder(Path(folder))
            staging.rename(path)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    fsync_folder(path.parent)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store. Raises MissingPathError or StoreError."""
    if not path.exists():
        raise MissingPathError(f"store '{path}' does not exist; write one with `kdcli cache-teacher --out {path}`")
    try:
        document = json.loads((path / "zarr.json").read_text())
        manifest = document["attributes"][ATTRIBUTE]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"'{path}' is not a kdcli store: its zarr.json has no '{ATTRIBUTE}' manifest") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != "kdcli.store":
        raise StoreError(f"'{path}' is not a kdcli store: format is {found!r}")
    views = manifest.get("views")
    named = isinstance(views, list) and views and all(isinstance(v, str) for v in views)
    if not named or not isinstance(manifest.get("schema"), dict):
        raise StoreError(f"store '{path}': its manifest has no views or no schema; write the store again")
    return dict(manifest)


class StoreWriter:
    """Writes whole shards of a store made by ``create_store``; several writers may share a store, not a shard."""

    def __init__(self, path: Path, schema: CacheSchema) -> None:
        self.path, self.schema = path, schema
        self._place = Folder(path)

    def done(self) -> set[int]:
        """Shards that the journal names."""
        return set(read_journal(self.path))

    def write_shard(self, shard: int, rows: list[dict[str, NDArray[Any]]], measured: Mapping[str, Any]) -> int:
        """Write the rows of ``shard`` and then its journal file; returns the bytes on disk.

        ``rows``: arrays by path, sparse ones unpadded, in row order; ``measured``: JSON, kept in the journal.
        Raises NoSpaceError on a full disk, with the shard's files removed: the finished shards stay. A shard that another
        process has finished meanwhile is left as it is.
        """
        layout = self.schema.layout()
        chunks = {a.path: [pack_chunk(row[a.path], a.shape, a.dtype) for row in rows] for a in layout}
        return self.write_chunks(shard, chunks, measured)

    def write_chunks(self, shard: int, chunks: Mapping[str, list[bytes]], measured: Mapping[str, Any]) -> int:
        """``write_shard`` with the chunks of every array packed already."""
        start, stop = self.schema.shard_range(shard)
        files: dict[str, dict[str, Any]] = {}
        layout = self.schema.layout()
        keys = [shard_key(array, shard) for array in layout]
        with full_disk_is_an_error(self.path, [self.path / key for key in keys]), self._claim(shard) as mine:
            if not mine:
                return 0
            for array, key in zip(layout, keys, strict=True):
                assert len(chunks[array.path]) == stop - start
                data = pack_shard(chunks[array.path], self.schema.shard_rows)
                self._place.write(key, data)
                files[array.path] = {"bytes": len(data), "crc32c": f"{google_crc32c.value(data):08x}"}
            entry = {"shard": shard, "rows": [start, stop], "files": files, "measured": measured}
            self._place.write(journal_key(shard), json.dumps(entry, sort_keys=True).encode())
        return sum(int(f["bytes"]) for f in files.values())

    @contextmanager
    def _claim(self, shard: int) -> Iterator[bool]:
        """Wait until no other process writes ``shard``; False when one has finished it meanwhile.

        Two writers in one shard would leave files of the one beside files of the other, which are not the same bytes when
        their machines round differently.
        """
        with hold_file(self.path / "journal" / f".{shard:06d}.lock"):
            yield not (self.path / journal_key(shard)).exists()


def shard_key(array: ArraySpec, shard: int) -> str:
    """Where Zarr's default chunk keys put a shard of ``array`` (whole trailing axes, so all other indices are 0)."""
    return "/".join([array.path, "c", str(shard), *("0" for _ in array.shape)])


def journal_key(shard: int) -> str:
    """The file that says that ``shard`` is finished."""
    return f"journal/{shard:06d}.json"


def read_journal(path: Path) -> dict[int, dict[str, Any]]:
    """Journal entries by shard. Raises StoreError for a file that is not one."""
    entries = {}
    place = Folder(path)
    for name in place.names("journal"):
        try:
            entry = json.loads(place.read(f"journal/{name}"))
            entries[int(entry["shard"])] = entry
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"journal file '{path}/journal/{name}' is corrupt; delete it and run cache-teacher again"
            ) from error
    return entries


def store_digest(path: Path) -> str:
    """sha256 over the manifest and the journal: names the exact contents of a store."""
    journal = read_journal(path)
    return digest({"manifest": read_manifest(path), "journal": [journal[k] for k in sorted(journal)]})


@contextmanager
def full_disk_is_an_error(path: Path, remove: Any = ()) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT into NoSpaceError, removing the files that would be half-written."""
    try:
        yield
    except OSError as error:
        if not isinstance(error, NoSpaceError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        for file in remove:
            Path(file).unlink(missing_ok=True)
        raise NoSpaceError(
            f"no space left on the disk of '{path}'; the finished shards are kept: free some space and run the same "
            "command again, it goes on from there"
        ) from error
