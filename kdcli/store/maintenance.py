"""Changes a finished store: drops tensors, takes in the tensors of another, copies rows into a new one.

Nothing is decoded or computed. A killed change is finished by the same call: each step finds out for itself whether it is
done already. A reader that is at work meanwhile goes on with the files it knows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from kdcli.errors import StoreError
from kdcli.files import fsync_folder
from kdcli.store.arrays import ArraySpec, shard_key
from kdcli.store.encoding_error import ErrorMeter, Measured, errors_of
from kdcli.store.journal import ARRAY_PATH, JournalEntry, ShardRecord, read_journal, write_entry
from kdcli.store.manifest import Manifest, read_manifest, write_manifest
from kdcli.store.reader import StoreReader
from kdcli.store.schema import StoreSchema
from kdcli.store.shards import ShardFile, corrupt, open_shards, pack_chunk, read_chunks
from kdcli.store.storage.base import Where
from kdcli.store.storage.resolve import open_storage
from kdcli.store.writer import StoreWriter

DROPPED = ".dropped"  # in a store: what is being deleted
ROOTS = ("boxes", "entries", "proposals", "row", "tensors")  # of arrays, in a store
Advance = Callable[[int], None]
MAX_FILES = 128  # open at a time, of all sources; the rows of a shard come from a few files of each array
_Files = dict[tuple[int, str, int], ShardFile]  # by source, array path and shard


def drop_tensors(store: Path, manifest: Manifest, advance: Advance) -> None:
    """Leave only the tensors of the schema of ``manifest`` in a store; ``manifest`` becomes that of the store.

    The manifest goes first, so that nobody looks for what is being deleted.
    """
    storage = open_storage(store)
    paths = {a.path for a in manifest.schema.layout()}
    keys = {t.need.key for t in manifest.schema.tensors}
    errors = None if manifest.errors is None else manifest.errors.of(keys)
    write_manifest(storage, replace(manifest, errors=errors))
    for _, entry in sorted(read_journal(storage).items()):
        files = {path: file for path, file in entry.files.items() if path in paths}
        kept = replace(entry, files=files, measured=entry.measured.of(keys))
        if kept != entry:
            write_entry(storage, kept)
        advance(1)
    for folder in unreferenced_folders(store):
        shutil.rmtree(folder)


def unreferenced_folders(store: Path) -> list[Path]:
    """Folders of arrays that the manifest does not name, whole or in part: what a killed ``drop_tensors`` left.

    Known by their names and not by their headers, which may be gone already.
    """
    arrays = {a.path for a in read_manifest(store).schema.layout()}
    groups = {parent.as_posix() for path in arrays for parent in PurePosixPath(path).parents}
    roots = {path.split("/")[0] for path in arrays} | set(ROOTS)
    found: list[Path] = []
    look = [store / root for root in sorted(roots)]
    while look:
        folder = look.pop()
        path = folder.relative_to(store).as_posix()
        if path in arrays or not folder.is_dir() or not ARRAY_PATH.fullmatch(path):  # what a person put there stays
            continue
        if path in groups:
            look += sorted(folder.iterdir())
        else:
            found.append(folder)
    return sorted(found)


def merge_overlay(store: Path, other: Path, manifest: Manifest, advance: Advance) -> None:
    """Move every array of the finished store ``other``, which has the same rows and shards, into ``store``.

    Arrays that both have are replaced. ``manifest``: of the joined store, whose errors are computed here. ``other`` has to
    be on the same disk, and is left without its shards. The manifest comes last: until then nobody looks for what is new.
    """
    storage, source = open_storage(store), read_manifest(other).schema
    mine, theirs = read_journal(store), read_journal(other)
    for array in source.layout():
        _move(other / array.path / "zarr.json", store / array.path / "zarr.json")
        for parent in (store / array.path).relative_to(store).parents:  # the groups that hold the array
            group = other / parent / "zarr.json"
            if parent != Path() and group.is_file() and not (store / parent / "zarr.json").exists():
                storage.write(f"{parent.as_posix()}/zarr.json", group.read_bytes())
    for shard, entry in sorted(mine.items()):
        for array in source.layout():
            key = shard_key(array, shard)
            _move(other / key, store / key)
        new = theirs[shard]
        joined = replace(entry, files={**entry.files, **new.files}, measured=entry.measured | new.measured)
        if joined != entry:
            write_entry(storage, joined)
        advance(1)
    write_manifest(storage, replace(manifest, errors=_errors(read_journal(storage))))


def remove_overlay(store: Path, overlay: Path) -> None:
    """Delete ``overlay``, a folder of ``store``: at once for everybody who looks for it, then file by file."""
    if overlay.exists():
        os.replace(overlay, store / DROPPED)
        fsync_folder(store)
    remove_dropped(store)


def remove_dropped(store: Path) -> None:
    """Finish what a killed ``remove_overlay`` began."""
    if (store / DROPPED).exists():
        shutil.rmtree(store / DROPPED)


def copy_rows(
    sources: Sequence[StoreReader], rows: Sequence[tuple[int, int]], out: Where, schema: StoreSchema, advance: Advance
) -> None:
    """Fill the store at ``out``, made by ``create_store`` with ``schema``, with ``rows`` (source, row of it) in order.

    Compressed bytes are copied as they are, unless padding differs. Errors of encodings were measured shard by shard, so
    the new journal has those of all rows of the sources, whether copied or not.
    """
    writer = StoreWriter(out, schema)
    done = writer.done()
    files: _Files = {}
    sums = [entry.measured for source in sources for _, entry in sorted(read_journal(source.storage).items())]
    for shard in range(schema.num_shards):
        start, stop = schema.shard_range(shard)
        if shard not in done:
            chunks = {array.path: _chunks(sources, rows[start:stop], array, files) for array in schema.layout()}
            encoding, precision = ErrorMeter(), ErrorMeter()
            for part in sums[shard :: schema.num_shards]:
                encoding.join(part.encoding)
                precision.join(part.precision)
            writer.write_chunks(shard, chunks, Measured(encoding=encoding.sums, precision=precision.sums))
        advance(1)


def record_errors(store: Where) -> bool:
    """Put the errors of all rows into the manifest, as ``errors``; False when shards are missing, and nothing is changed.

    They follow from the journal alone, so it does not matter who does it, how often, or how many do it at the same time.
    """
    storage = open_storage(store)
    manifest, journal = read_manifest(storage), read_journal(storage)
    shards = manifest.schema.num_shards
    if len(journal) != shards or max(journal) >= shards:
        return False
    errors = _errors(journal)
    if manifest.errors != errors:
        # a file has one writer at a time: two parts that end together would take each other's temporary file away
        with storage.lock_file("journal/.errors.lock"):
            write_manifest(storage, replace(manifest, errors=errors))
    return True


def _errors(journal: Mapping[int, JournalEntry]) -> Measured:
    """Over all shards, in their order: a sum in another order is another number."""
    return errors_of(entry.measured for _, entry in sorted(journal.items()))


def _chunks(
    sources: Sequence[StoreReader], places: Sequence[tuple[int, int]], array: ArraySpec, files: _Files
) -> list[bytes]:
    """The chunks of ``array`` for rows (source, row of it), padded as it is; asked for together, for an object store."""
    found: dict[int, bytes] = {}
    for source, reader in enumerate(sources):
        theirs, size = reader.layout[array.path], reader.schema.shard_rows
        mine = {n: divmod(row, size) for n, (k, row) in enumerate(places) if k == source}
        new = [s for s in dict.fromkeys(s for s, _ in mine.values()) if (source, array.path, s) not in files]
        keys = [shard_key(theirs, s) for s in new]
        opened = open_shards(reader.storage, keys, size)
        for s, key, file in zip(new, keys, opened, strict=True):  # whole: the copy gets a digest of its own
            if ShardRecord.of(reader.storage.read(key), reader.schema.version) != reader.records[s][array.path]:
                raise corrupt(file.name, "is not what was written")
        files.update({(source, array.path, s): file for s, file in zip(new, opened, strict=True)})
        wanted = [(files[source, array.path, s], position) for s, position in mine.values()]
        for n, (file, _), chunk in zip(mine, wanted, read_chunks(reader.storage, wanted), strict=True):
            found[n] = chunk
            if theirs.shape != array.shape:
                value = file.unpack(chunk, theirs, theirs.shape)
                found[n] = pack_chunk(value[: array.shape[0]], array)
    while len(files) > MAX_FILES:
        del files[next(iter(files))]
    return [found[n] for n in range(len(places))]


def _move(source: Path, target: Path) -> None:
    """Move a file; a killed move that is repeated finds it there."""
    if not source.exists():
        if not target.exists():
            raise StoreError(f"'{source}' is missing; delete its folder and run the same command again")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
    fsync_folder(target.parent)
