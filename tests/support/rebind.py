"""A store that says it is another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kdcli.store.journal import read_journal, write_entry
from kdcli.store.manifest import Manifest, write_manifest
from kdcli.store.storage.resolve import open_storage


def rebind(store: Path, manifest: Manifest) -> None:
    """Put ``manifest`` into a store, and what it changes into the journal."""
    journal = read_journal(store)
    write_manifest(store, manifest)
    for entry in journal.values():
        write_entry(open_storage(store), replace(entry, store=manifest.binding))
