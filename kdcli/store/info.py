"""What ``cache info`` tells of a store."""

from __future__ import annotations

from typing import Any

from kdcli.store.storage.base import Where


def store_info(store: Where) -> dict[str, Any]:
    """The manifest of a store with its sizes and measured errors, as JSON."""
    from kdcli.store.encoding_error import summarise
    from kdcli.store.image_codec import PIXEL_ENCODING, PIXELS
    from kdcli.store.journal import read_journal, store_digest
    from kdcli.store.manifest import read_manifest
    from kdcli.store.schema import StoreSchema

    manifest = read_manifest(store)
    schema = StoreSchema.from_json(manifest["schema"])
    journal = read_journal(store)
    errors = summarise(e["measured"]["encoding"] for e in journal.values())
    precision = summarise(e["measured"]["precision"] for e in journal.values())
    by_array: dict[str, int] = {}
    for entry in journal.values():
        for path, file in entry["files"].items():
            by_array[path] = by_array.get(path, 0) + file["bytes"]
    tensors = {
        t.need.key: {
            "dims": list(t.dims),
            "encoding": t.encoding.to_json()["name"],
            "bytes": sum(by_array.get(a.path, 0) for a in schema.tensor_arrays(t).values()),
            "error": errors.get(t.need.key),
            "precision_error": precision.get(t.need.key),
        }
        for t in schema.tensors
    }
    return {
        **{k: v for k, v in manifest.items() if k not in ("schema", "errors")},  # both by tensor, below
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
