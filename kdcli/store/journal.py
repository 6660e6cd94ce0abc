"""The journal: one file a finished shard, written after the shard's data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcli.errors import StoreError
from kdcli.store.checksummed_json import add_checksum, digest, parse, verify_checksum
from kdcli.store.manifest import read_manifest
from kdcli.store.storage.base import Where
from kdcli.store.storage.local import LocalStorage
from kdcli.store.storage.resolve import open_storage
from kdcli.store.validation import check_entry


def journal_key(shard: int) -> str:
    """The file that says that ``shard`` is finished."""
    return f"journal/{shard:06d}.json"


def journal_bytes(entry: Mapping[str, Any]) -> bytes:
    """The file of a journal entry."""
    return json.dumps(add_checksum(entry), sort_keys=True).encode()


def read_journal(where: Where) -> dict[int, dict[str, Any]]:
    """Journal entries by shard. Raises StoreError for a file that is not one."""
    entries = {}
    storage = open_storage(where)
    names = storage.names("journal")
    for name, data in zip(names, storage.read_all([f"journal/{name}" for name in names]), strict=True):
        try:
            entry = verify_checksum(parse(data), f"journal file '{storage}/journal/{name}'")
            check_entry(entry, name)
            entries[entry["shard"]] = entry
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"journal file '{storage}/journal/{name}' is corrupt; delete it and run cache-teacher again"
            ) from error
    return entries


def store_digest(where: Where) -> str:
    """sha256 over the manifest and the journal: names the exact contents of a store.

    Without ``errors``, which follow from the journal: a store that is read before they are summed up stays the same one.
    """
    journal = read_journal(where)
    manifest = {k: v for k, v in read_manifest(where).items() if k != "errors"}
    return digest({"manifest": manifest, "journal": [journal[k] for k in sorted(journal)]})


def _write_journal(store: Path, entry: Mapping[str, Any]) -> None:
    LocalStorage(store).write(journal_key(int(entry["shard"])), journal_bytes(entry))
