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

from kdcli.errors import KDError, MissingPathError, NoSpaceError, StoreError
from kdcli.files import fsync_folder
from kdcli.store.arrays import ZSTD_LEVEL, ArraySpec
from kdcli.store.checksummed_json import parse, seal, unseal
from kdcli.store.locks import hold_file, remove_free
from kdcli.store.schema import FORMAT_VERSION, CacheSchema, digest
from kdcli.store.shards import pack_chunk, pack_shard
from kdcli.store.storage.local import Folder, Place, Where, place_of
from kdcli.store.validation import check_entry, check_manifest

ATTRIBUTE = "kdcli"


def create_store(where: Where, schema: CacheSchema, manifest: Mapping[str, Any], image_ids: NDArray[np.int64]) -> None:
    """Create an empty store: appears whole or not at all.

    A folder is renamed from one beside it; in an object store the root's zarr.json is put last, by one process alone:
    FileExistsError for the others. ``manifest``: JSON fields that do not change while rows are written; the schema is kept
    beside it.
    """
    place = place_of(where)
    if not isinstance(place, Folder):
        _create_objects(place, schema, manifest, image_ids)
        return
    path = place.path
    staging = path.with_name(f".{path.name}.creating")
    shutil.rmtree(staging, ignore_errors=True)
    staging.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_is_an_error(place):
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
    place: Place, schema: CacheSchema, manifest: Mapping[str, Any], image_ids: NDArray[np.int64]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        staging = Path(folder) / "store"
        make_arrays(staging, schema, manifest, image_ids)
        keys = sorted(f.relative_to(staging).as_posix() for f in staging.rglob("*") if f.is_file())
        keys.remove("zarr.json")
        for key in keys:
            if not place.create(key, (staging / key).read_bytes()):
                raise StoreError(
                    f"'{place}/{key}' is of another store, whose making was broken off or goes on now; delete what is "
                    "there, or choose another --out"
                )
        if not place.create("zarr.json", (staging / "zarr.json").read_bytes()):
            raise FileExistsError(f"'{place}' was made by another process at this moment")


def make_arrays(target: Any, schema: CacheSchema, manifest: Mapping[str, Any], image_ids: NDArray[np.int64]) -> None:
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
    group.attrs[ATTRIBUTE] = seal({**manifest, "schema": schema.to_json()})


def read_manifest(where: Where) -> dict[str, Any]:
    """The manifest of a store. Raises MissingPathError or StoreError."""
    path = place_of(where)
    if not path.exists():
        raise MissingPathError(f"store '{path}' does not exist; write one with `kdcli cache-teacher --out {path}`")
    try:
        document = parse(path.read("zarr.json"))
        manifest = document["attributes"][ATTRIBUTE]
        plain = {"attributes": {ATTRIBUTE: manifest}, "zarr_format": 3, "node_type": "group"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, KDError):
            raise
        raise StoreError(f"'{path}' is not a kdcli store: its zarr.json has no '{ATTRIBUTE}' manifest") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != "kdcli.store":
        raise StoreError(f"'{path}' is not a kdcli store: format is {repr(found)[:80]}")
    if manifest.get("version") != FORMAT_VERSION:
        raise StoreError(
            f"store '{path}' is of format version {repr(manifest.get('version'))[:80]}, this kdcli reads {FORMAT_VERSION}; "
            "write it again, or use the kdcli that wrote it"
        )
    if document != plain:
        raise StoreError(f"the zarr.json of store '{path}' is not what was written; write the store again")
    manifest = unseal(manifest, f"the manifest of store '{path}'")
    try:
        check_manifest(manifest)
    except ValueError as error:
        raise StoreError(f"store '{path}': its manifest has {error}; write the store again") from error
    return dict(manifest)


class StoreWriter:
    """Writes whole shards of a store made by ``create_store``; several writers may share a store, not a shard."""

    def __init__(self, where: Where, schema: CacheSchema) -> None:
        self.place, self.schema = place_of(where), schema
        if isinstance(self.place, Folder):
            remove_free(self.place.path / "journal")

    def done(self) -> set[int]:
        """Shards that the journal names."""
        return set(read_journal(self.place))

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
        with full_disk_is_an_error(self.place, keys), self._claim(shard) as mine:
            if not mine:
                return 0
            for array, key in zip(layout, keys, strict=True):
                assert len(chunks[array.path]) == stop - start
                data = pack_shard(chunks[array.path], self.schema.shard_rows)
                self.place.write(key, data)
                files[array.path] = {"bytes": len(data), "crc32c": f"{google_crc32c.value(data):08x}"}
            entry = {"shard": shard, "rows": [start, stop], "files": files, "measured": measured}
            if not self.place.create(journal_key(shard), journal_bytes(entry)):
                self._give_up(shard)
        return sum(int(f["bytes"]) for f in files.values())

    @contextmanager
    def _claim(self, shard: int) -> Iterator[bool]:
        """Wait until no other process writes ``shard``; False when one has finished it meanwhile.

        Two writers in one shard would leave files of the one beside files of the other, which are not the same bytes when
        their machines round differently.
        """
        if not isinstance(self.place, Folder):  # no locks there: the journal's own put shows an overlap
            yield not self.place.has(journal_key(shard))
            return
        with hold_file(self.place.path / "journal" / f".{shard:06d}.lock"):
            yield not self.place.has(journal_key(shard))

    def _give_up(self, shard: int) -> None:
        """Another process has journalled this shard while we wrote it, with other bytes: some of the files are ours."""
        self.place.delete(journal_key(shard))
        raise StoreError(
            f"shard {shard} of '{self.place}' was written by two processes at the same time, with other numbers; it counts "
            "as not written: run the same command again, each part once"
        )


def shard_key(array: ArraySpec, shard: int) -> str:
    """Where Zarr's default chunk keys put a shard of ``array`` (whole trailing axes, so all other indices are 0)."""
    return "/".join([array.path, "c", str(shard), *("0" for _ in array.shape)])


def journal_key(shard: int) -> str:
    """The file that says that ``shard`` is finished."""
    return f"journal/{shard:06d}.json"


def journal_bytes(entry: Mapping[str, Any]) -> bytes:
    """The file of a journal entry."""
    return json.dumps(seal(entry), sort_keys=True).encode()


def read_journal(where: Where) -> dict[int, dict[str, Any]]:
    """Journal entries by shard. Raises StoreError for a file that is not one."""
    entries = {}
    place = place_of(where)
    names = place.names("journal")
    for name, data in zip(names, place.read_all([f"journal/{name}" for name in names]), strict=True):
        try:
            entry = unseal(parse(data), f"journal file '{place}/journal/{name}'")
            check_entry(entry, name)
            entries[entry["shard"]] = entry
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"journal file '{place}/journal/{name}' is corrupt; delete it and run cache-teacher again"
            ) from error
    return entries


def store_digest(where: Where) -> str:
    """sha256 over the manifest and the journal: names the exact contents of a store.

    Without ``errors``, which follow from the journal: a store that is read before they are summed up stays the same one.
    """
    journal = read_journal(where)
    manifest = {k: v for k, v in read_manifest(where).items() if k != "errors"}
    return digest({"manifest": manifest, "journal": [journal[k] for k in sorted(journal)]})


@contextmanager
def full_disk_is_an_error(place: Place, remove: Sequence[str] = ()) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT into NoSpaceError, removing the files that would be half-written."""
    try:
        yield
    except OSError as error:
        if not isinstance(error, NoSpaceError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        for key in remove:
            place.delete(key)
        raise NoSpaceError(
            f"no space left on the disk of '{place}'; the finished shards are kept: free some space and run the same "
            "command again, it goes on from there"
        ) from error
