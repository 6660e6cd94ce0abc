"""The manifest: everything that a store's numbers depend on, and the comparison that refuses a foreign store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kdcli.errors import KDError, MissingPathError, StoreError
from kdcli.store.checksummed_json import add_checksum, parse, verify_checksum
from kdcli.store.schema import FORMAT_VERSION
from kdcli.store.storage.base import Where
from kdcli.store.storage.resolve import open_storage
from kdcli.store.validation import check_manifest

ATTRIBUTE = "kdcli"


def read_manifest(where: Where) -> dict[str, Any]:
    """The manifest of a store. Raises MissingPathError or StoreError."""
    path = open_storage(where)
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
    manifest = verify_checksum(manifest, f"the manifest of store '{path}'")
    try:
        check_manifest(manifest)
    except ValueError as error:
        raise StoreError(f"store '{path}': its manifest has {error}; write the store again") from error
    return dict(manifest)


def write_manifest(store: Where, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest of a store, in one step."""
    storage = open_storage(store)
    document = json.loads(storage.read("zarr.json"))
    document["attributes"][ATTRIBUTE] = add_checksum(manifest)
    storage.write("zarr.json", json.dumps(document, indent=2).encode())


def compare_manifests(ours: Mapping[str, Any], stored: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every field that differs, as ``field: stored X, here Y``; fields that only one side has are left out of ``ours``."""
    differences = []
    for name, value in ours.items():
        other = stored.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            differences += compare_manifests(value, other, f"{prefix}{name}.")
        elif value != other:
            differences.append(f"{prefix}{name}: store {_short(other)}, here {_short(value)}")
    return differences


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:197] + "..."
