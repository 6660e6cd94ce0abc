"""Writes a store: whole shards, checksummed, journalled after the data; a killed run goes on where it stopped.

One process owns a whole shard: two writers in one lose rows. A shard counts as written when its journal file names it;
the journal file is written (temporary file, fsync, rename, fsync of the folder) after the shard's data are on the disk.
Nothing in a store depends on the time or the place of writing, so a resumed store is byte for byte an uninterrupted one.
"""

from __future__ import annotations

import errno
import fcntl
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

from kdcli.cache.schema import ArraySpec, CacheSchema, digest
from kdcli.errors import MissingPathError, NoSpaceError, StoreError
from kdcli.files import atomic_write_text, fsync_folder, remove_leftovers

ZSTD_LEVEL = 1  # codes hardly compress; what zstd is for is the padding behind sparse rows
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
    """Appends whole shards to a store made by ``create_store``."""

    def __init__(self, path: Path, schema: CacheSchema) -> None:
        self.path, self.schema = path, schema
        self._group = zarr.open_group(path, mode="r+")
        # an all-zero row must differ from a missing one; zarr reads this setting when an array is opened
        with zarr.config.set({"array.write_empty_chunks": True}):
            self._arrays: dict[str, Any] = {a.path: self._group[a.path] for a in schema.layout()}
        for leftover in path.rglob("*.partial"):  # what a killed write of zarr's left behind
            leftover.unlink()
        remove_leftovers(path)

    def done(self) -> set[int]:
        """Shards that the journal names."""
        return set(read_journal(self.path))

    def write_shard(self, shard: int, rows: list[dict[str, NDArray[Any]]], measured: Mapping[str, Any]) -> int:
        """Write the rows of ``shard`` and then its journal file; returns the bytes on disk.

        ``rows``: arrays by path, sparse ones unpadded, in row order; ``measured``: JSON, kept in the journal.
        Raises NoSpaceError on a full disk, with the shard's files removed: the finished shards stay.
        """
        start, stop = self.schema.shard_range(shard)
        assert len(rows) == stop - start
        files = {}
        with full_disk_is_an_error(self.path, self._files(shard).values()):
            self._forget(shard)
            for array in self.schema.layout():
                block = np.zeros((stop - start, *array.shape), array.dtype)
                for position, row in enumerate(rows):
                    value = row[array.path]
                    block[position, : len(value)] = value
                self._arrays[array.path][start:stop] = block
                file = self._files(shard)[array.path]
                files[array.path] = _finish_file(file)
            entry = {"shard": shard, "rows": [start, stop], "files": files, "measured": measured}
            atomic_write_text(self._journal(shard), json.dumps(entry, sort_keys=True))
        return sum(int(f["bytes"]) for f in files.values())

    def _forget(self, shard: int) -> None:
        """Remove what a killed run or a power cut left of ``shard``: zarr would read a file before replacing it."""
        for file in (self._journal(shard), *self._files(shard).values()):
            file.unlink(missing_ok=True)

    def _journal(self, shard: int) -> Path:
        return self.path / "journal" / f"{shard:06d}.json"

    def _files(self, shard: int) -> dict[str, Path]:
        return {a.path: shard_file(self.path, a, shard) for a in self.schema.layout()}


def shard_file(store: Path, array: ArraySpec, shard: int) -> Path:
    """Where Zarr's default chunk keys put a shard of ``array`` (whole trailing axes, so all other indices are 0)."""
    return store / array.path / "c" / str(shard) / "/".join("0" for _ in array.shape)


def read_journal(path: Path) -> dict[int, dict[str, Any]]:
    """Journal entries by shard. Raises StoreError for a file that is not one."""
    entries = {}
    for file in sorted((path / "journal").glob("*.json")):
        try:
            entry = json.loads(file.read_text())
            entries[int(entry["shard"])] = entry
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"journal file '{file}' is corrupt; delete it and run cache-teacher again") from error
    return entries


def store_digest(path: Path) -> str:
    """sha256 over the manifest and the journal: names the exact contents of a store."""
    journal = read_journal(path)
    return digest({"manifest": read_manifest(path), "journal": [journal[k] for k in sorted(journal)]})


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Hold the folder ``path`` for writing: two writers in one shard lose rows. The lock ends with the process.

    Raises StoreError when another process holds it.
    """
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"'{path}' is being written by another process; wait for it, or choose another --out"
            ) from error
        yield
    finally:
        os.close(folder)


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


def _finish_file(file: Path) -> dict[str, Any]:
    """Flush a shard to the disk and return its size and checksum."""
    with file.open("rb+") as handle:
        data = handle.read()
        os.fsync(handle.fileno())
    fsync_folder(file.parent)
    return {"bytes": len(data), "crc32c": f"{google_crc32c.value(data):08x}"}
