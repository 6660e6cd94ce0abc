"""The journal: one file for each finished shard, written after the shard's data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kdcli.errors import StoreError
from kdcli.store.checksummed_json import add_checksum, digest, parse, verify_checksum
from kdcli.store.encoding_error import Measured
from kdcli.store.manifest import read_manifest
from kdcli.store.storage.base import Storage, Where
from kdcli.store.storage.resolve import open_storage
from kdcli.store.validation import check_keys, is_count, require, table

ARRAY_PATH = re.compile(r"[a-z][a-z0-9_]*([/@+][a-z0-9_]+)*")
MAX_PATH = 255
CHECKSUM = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True)
class ShardRecord:
    """What the file of one array in a shard has to be."""

    bytes: int
    crc32c: str  # hexadecimal

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {"bytes": self.bytes, "crc32c": self.crc32c}


@dataclass(frozen=True, kw_only=True)
class JournalEntry:
    """A finished shard."""

    shard: int
    rows: tuple[int, int]  # the first, and one past the last
    files: Mapping[str, ShardRecord]  # by array path
    measured: Measured  # sums over its rows

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "shard": self.shard,
            "rows": list(self.rows),
            "files": {path: file.to_json() for path, file in self.files.items()},
            "measured": self.measured.to_json(),
        }

    def to_bytes(self) -> bytes:
        """The file of this entry."""
        return json.dumps(add_checksum(self.to_json()), sort_keys=True).encode()

    @staticmethod
    def from_json(data: Any, name: str) -> JournalEntry:
        """Inverse of ``to_json``. Raises ValueError when it cannot be what the journal file ``name`` holds."""
        check_keys(data, "entry", ("shard", "rows", "files", "measured"))
        shard, rows = data["shard"], data["rows"]
        require(is_count(shard) and name == f"{shard:06d}.json", "shard")
        require(isinstance(rows, list) and len(rows) == 2 and all(map(is_count, rows)) and rows[0] < rows[1], "rows")
        files = {path: _record(path, file) for path, file in table(data["files"], "files").items()}
        measured = Measured.from_json(data["measured"])
        return JournalEntry(shard=shard, rows=(rows[0], rows[1]), files=files, measured=measured)


def journal_key(shard: int) -> str:
    """The file that says that ``shard`` is finished."""
    return f"journal/{shard:06d}.json"


def write_entry(storage: Storage, entry: JournalEntry) -> None:
    """Replace the journal file of a shard."""
    storage.write(journal_key(entry.shard), entry.to_bytes())


def read_journal(where: Where) -> dict[int, JournalEntry]:
    """Journal entries by shard. Raises StoreError for a file that is not one."""
    entries = {}
    storage = open_storage(where)
    names = storage.names("journal")
    for name, data in zip(names, storage.read_all([f"journal/{name}" for name in names]), strict=True):
        try:
            plain = verify_checksum(parse(data), f"journal file '{storage}/journal/{name}'")
            entry = JournalEntry.from_json(plain, name)
        except ValueError as error:
            raise StoreError(
                f"journal file '{storage}/journal/{name}' is corrupt; delete it and run cache-teacher again"
            ) from error
        entries[entry.shard] = entry
    return entries


def store_digest(where: Where) -> str:
    """sha256 over the manifest and the journal: names the exact contents of a store.

    Without ``errors``, which follow from the journal: a store that is read before they are summed up stays the same one.
    """
    journal = read_journal(where)
    manifest = replace(read_manifest(where), errors=None)
    return digest({"manifest": manifest.to_json(), "journal": [journal[k].to_json() for k in sorted(journal)]})


def _record(path: str, file: Any) -> ShardRecord:
    require(len(path) <= MAX_PATH and ARRAY_PATH.fullmatch(path) is not None, "files")
    check_keys(file, "files", ("bytes", "crc32c"))
    size, crc = file["bytes"], file["crc32c"]
    require(is_count(size) and isinstance(crc, str) and CHECKSUM.fullmatch(crc) is not None, "files")
    return ShardRecord(size, crc)
