"""The journal: one file for each finished shard, written after the shard's data.

An entry has a digest of every byte of the shard's files and the store that they belong to. In format version 1 it has
their crc32c alone, which is the same for any chunks of these lengths, as each ends in its own, and names no store.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kdcli.errors import StoreError
from kdcli.store.checksummed_json import add_checksum, digest, parse, verify_checksum
from kdcli.store.checksums import crc_hex
from kdcli.store.encoding_error import Measured
from kdcli.store.manifest import Manifest, read_manifest
from kdcli.store.storage.base import Storage, Where
from kdcli.store.storage.resolve import open_storage
from kdcli.store.validation import check_keys, is_count, require, table

ARRAY_PATH = re.compile(r"[a-z][a-z0-9_]*([/@+][a-z0-9_]+)*")
MAX_PATH = 255
CRC, SHA256 = re.compile(r"[0-9a-f]{8}"), re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardRecord:
    """What the file of one array in a shard has to be. Digests are hexadecimal."""

    size: int  # bytes
    sha256: str | None  # of the file; None in format version 1
    index: str | None  # its last four bytes: the crc32c of where its chunks are, which a reader compares; likewise
    crc32c: str | None  # of the file; in format version 1 alone

    @staticmethod
    def of(data: bytes, version: int) -> ShardRecord:
        """Of the bytes of a file, in a store of format ``version``."""
        if version == 1:
            return ShardRecord(len(data), None, None, crc_hex(data))
        return ShardRecord(len(data), hashlib.sha256(data).hexdigest(), data[-4:].hex(), None)

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        if self.crc32c is not None:
            return {"bytes": self.size, "crc32c": self.crc32c}
        return {"bytes": self.size, "sha256": self.sha256, "index": self.index}


@dataclass(frozen=True, kw_only=True)
class JournalEntry:
    """A finished shard."""

    shard: int
    rows: tuple[int, int]  # the first, and one past the last
    files: Mapping[str, ShardRecord]  # by array path
    measured: Measured  # sums over its rows
    store: str | None  # what Manifest.binding says of its store; None in format version 1

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "shard": self.shard,
            "rows": list(self.rows),
            "files": {path: file.to_json() for path, file in self.files.items()},
            "measured": self.measured.to_json(),
            **({} if self.store is None else {"store": self.store}),
        }

    def to_bytes(self) -> bytes:
        """The file of this entry."""
        return json.dumps(add_checksum(self.to_json()), sort_keys=True).encode()

    @staticmethod
    def from_json(data: Any, name: str, version: int) -> JournalEntry:
        """Inverse of ``to_json``, in a store of format ``version``.

        Raises ValueError when it cannot be what the journal file ``name`` holds.
        """
        check_keys(data, "entry", ("shard", "rows", "files", "measured", *(() if version == 1 else ("store",))))
        shard, rows = data["shard"], data["rows"]
        require(is_count(shard) and name == f"{shard:06d}.json", "shard")
        require(isinstance(rows, list) and len(rows) == 2 and all(map(is_count, rows)) and rows[0] < rows[1], "rows")
        files = {path: _record(path, file, version) for path, file in table(data["files"], "files").items()}
        measured = Measured.from_json(data["measured"])
        store = None if version == 1 else data["store"]
        require(version == 1 or _matches(SHA256, store), "store")
        return JournalEntry(shard=shard, rows=(rows[0], rows[1]), files=files, measured=measured, store=store)


def journal_key(shard: int) -> str:
    """The file that says that ``shard`` is finished."""
    return f"journal/{shard:06d}.json"


def write_entry(storage: Storage, entry: JournalEntry) -> None:
    """Replace the journal file of a shard."""
    storage.write(journal_key(entry.shard), entry.to_bytes())


def read_journal(where: Where, manifest: Manifest | None = None) -> dict[int, JournalEntry]:
    """Journal entries by shard. Raises StoreError for a file that is not one, or that belongs to another store.

    ``manifest``: of the store, if it is known; None: it is read.
    """
    entries = {}
    storage = open_storage(where)
    manifest = manifest or read_manifest(storage)
    version = manifest.schema.version
    names = storage.names("journal")
    for name, data in zip(names, storage.read_all([f"journal/{name}" for name in names]), strict=True):
        try:
            plain = verify_checksum(parse(data), f"journal file '{storage}/journal/{name}'")
            entry = JournalEntry.from_json(plain, name, version)
            require(entry.to_bytes() == data, "spelling")  # a changed byte need not change a value: one more space
        except ValueError as error:
            raise StoreError(
                f"journal file '{storage}/journal/{name}' is corrupt; delete it and run cache-teacher again"
            ) from error
        if entry.store is not None and entry.store != manifest.binding:
            raise StoreError(
                f"journal file '{storage}/journal/{name}' belongs to another store, of another teacher, data set or run; put "
                "back the one that was here, or delete it and run the same cache-teacher command again"
            )
        entries[entry.shard] = entry
    return entries


def store_digest(where: Where) -> str:
    """sha256 over the manifest and the journal: names the exact contents of a store.

    Without ``errors``, which follow from the journal: a store that is read before they are summed up stays the same one.
    """
    manifest = replace(read_manifest(where), errors=None)
    journal = read_journal(where, manifest)
    return digest({"manifest": manifest.to_json(), "journal": [journal[k].to_json() for k in sorted(journal)]})


def _record(path: str, file: Any, version: int) -> ShardRecord:
    require(len(path) <= MAX_PATH and ARRAY_PATH.fullmatch(path) is not None, "files")
    check_keys(file, "files", ("bytes", "crc32c") if version == 1 else ("bytes", "sha256", "index"))
    require(is_count(file["bytes"]), "files")
    for name, pattern in (("crc32c", CRC), ("index", CRC), ("sha256", SHA256)):
        require(name not in file or _matches(pattern, file[name]), "files")
    return ShardRecord(file["bytes"], file.get("sha256"), file.get("index"), file.get("crc32c"))


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
