"""What ``cache info`` tells of a store: its manifest, its sizes and what its encodings cost."""

from __future__ import annotations

from typing import Any

from kdcli.store.storage.base import Where


def store_info(store: Where) -> dict[str, Any]:
    """The manifest of a store with its sizes and measured errors, as JSON. Raises MissingPathError or StoreError."""
    from kdcli.store.encoding_error import errors_of
    from kdcli.store.image_codec import PIXEL_ENCODING, PIXELS
    from kdcli.store.journal import read_journal, store_digest
    from kdcli.store.manifest import read_manifest

    manifest = read_manifest(store)
    schema = manifest.schema
    journal = read_journal(store, manifest)
    errors = errors_of(entry.measured for entry in journal.values())
    by_array: dict[str, int] = {}
    for entry in journal.values():
        for path, file in entry.files.items():
            by_array[path] = by_array.get(path, 0) + file.size
    tensors = {
        t.need.key: {
            "dims": list(t.dims),
            "encoding": t.encoding.to_json()["name"],
            "bytes": sum(by_array.get(a.path, 0) for a in schema.tensor_arrays(t).values()),
            "error": errors.encoding.get(t.need.key),
            "precision_error": errors.precision.get(t.need.key),
        }
        for t in schema.tensors
    }
    return {
        **manifest.describe(),
        "rows": schema.rows,
        "shards": schema.num_shards,
        "shards_done": len(journal),
        "complete": len(journal) == schema.num_shards,
        "bytes": sum(by_array.values()),
        "bytes_by_array": by_array,
        "tensors": tensors,
        "images": {"encoding": PIXEL_ENCODING, "bytes": by_array.get(PIXELS, 0)} if schema.images else None,
        "digest": store_digest(store),
    }
