"""Stores with a right journal for what they should not hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kdcli.store.arrays import shard_key
from kdcli.store.journal import ShardRecord, read_journal, write_entry
from kdcli.store.manifest import Manifest, read_manifest, write_manifest
from kdcli.store.storage.base import Where
from kdcli.store.storage.resolve import open_storage


def rebind(store: Path, manifest: Manifest) -> None:
    """Put ``manifest`` into a store, and what it changes into the journal."""
    journal = read_journal(store)
    write_manifest(store, manifest)
    for entry in journal.values():
        write_entry(open_storage(store), replace(entry, store=manifest.binding))


def reseal(store: Where, shard: int) -> None:
    """Have the journal name the files of a shard as they are now, as one who means harm would."""
    storage, manifest = open_storage(store), read_manifest(store)
    entry = read_journal(store)[shard]
    files = {a.path: storage.read(shard_key(a, shard)) for a in manifest.schema.layout()}
    records = {path: ShardRecord.of(data, manifest.schema.version) for path, data in files.items()}
    write_entry(storage, replace(entry, files=records))
