"""``cache verify``: every checksum of a store, and the teacher run again on some of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c

from kdcli.cache.fidelity import ErrorMeter, summarise
from kdcli.cache.reader import CacheReader, compare_manifests
from kdcli.cache.schema import CacheSchema, row_tensor
from kdcli.cache.schema import collate as collate_rows
from kdcli.cache.writer import read_journal, read_manifest
from kdcli.data.views import format_views
from kdcli.detectors.read import AT_PROPOSALS
from kdcli.engine.caching import Plan, plan_store, teacher_rows
from kdcli.engine.joining import recheck_regions, spread
from kdcli.engine.watch import Watcher
from kdcli.errors import StoreError
from kdcli.options import CacheOptions, build, layer
from kdcli.structures import RowKey


def verify_checksums(store: Path, watcher: Watcher) -> tuple[int, int]:
    """Compare every shard file with the size and crc32c in the journal; returns (files, bytes).

    Raises StoreError naming the first file that is missing, torn or changed.
    """
    CacheReader(store)  # complete, and of a schema that can be read
    journal = read_journal(store)
    watcher.stage("verify", sum(len(e["files"]) for e in journal.values()))
    files = total = 0
    for shard, entry in sorted(journal.items()):
        for array, recorded in entry["files"].items():
            folder = store / array / "c" / str(shard)
            found = [f for f in folder.rglob("*") if f.is_file()]
            if len(found) != 1:
                raise StoreError(f"'{folder}' should hold one shard file, not {len(found)}; {_again(store, shard)}")
            data = found[0].read_bytes()
            if len(data) != recorded["bytes"] or f"{google_crc32c.value(data):08x}" != recorded["crc32c"]:
                raise StoreError(f"shard file '{found[0]}' is not what was written; {_again(store, shard)}")
            files += 1
            total += len(data)
            watcher.advance(1)
    return files, total


def verify_teacher(plan: Plan, store: Path, rows: int, watcher: Watcher) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run the teacher again on ``rows`` evenly spaced rows and compare; returns (rows compared, error per tensor).

    Raises StoreError when the teacher is not the one of the manifest.
    """
    reader = CacheReader(store)
    stored = reader.manifest["teacher"]
    differences = compare_manifests({"weights_sha256": plan.manifest["teacher"]["weights_sha256"]}, stored)
    if differences:
        raise StoreError(f"store '{store}' was written by another teacher: {'; '.join(differences)}")
    recheck_regions(replace(plan.source, reader=reader), plan.positions, plan.views)
    chosen = spread(plan.positions, plan.views, rows)
    watcher.stage("teacher again", len(chosen))
    meter = ErrorMeter()
    for item in chosen:
        sample = plan.source.load(item)
        row = reader.read(RowKey(plan.source.dataset.image_id(item[0]), item[1]))
        plan.source.check_row(row, sample)
        decoded = reader.schema.decode(collate_rows([row.arrays], reader.layout.values()), plan.needs)
        boxes = decoded.get(AT_PROPOSALS[0].key)  # at which the RoI head is read again
        values = teacher_rows(plan, [sample], None if boxes is None else [boxes.to(plan.device)])
        for tensor in plan.schema.tensors:
            key, exact = tensor.need.key, values[0][tensor.need.key]
            theirs = row_tensor(decoded[key])
            theirs = theirs[0] if theirs.ndim > exact.ndim else theirs
            if theirs.shape != exact.shape:
                raise StoreError(f"{RowKey(plan.source.dataset.image_id(item[0]), item[1])}: its regions have changed")
            keep: Any = plan.schema.valid_rows(tensor, sample.valid).numpy() if tensor.need.dense else slice(None)
            meter.add(key, exact[keep], theirs[keep])
        watcher.advance(1)
    return len(chosen), summarise([meter.sums])


def _again(store: Path, shard: int) -> str:
    return (
        f"delete '{store / 'journal' / f'{shard:06d}.json'}' and run the same cache-teacher command again: "
        "it writes this shard anew"
    )


def plan_of_store(
    store: Path, data: str, teacher: str, device: str | None, watcher: Watcher, *, methods: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None, encoding: str = "default",
) -> Plan:  # fmt: skip
    """The plan that wrote ``store``, rebuilt from its manifest with the given data set and teacher.

    With ``methods`` and ``settings`` (options of methods), the plan of a store of these. Raises StoreError when the data
    set is not that of the manifest.
    """
    manifest = read_manifest(store)
    schema = CacheSchema.from_json(manifest["schema"])
    run, left_out = manifest["teacher_run"], manifest["dataset"]["left_out"]
    fields = {
        "data": data, "teacher": teacher, "method": manifest["methods"] if methods is None else methods,
        "split": manifest["dataset"]["split"], "canvas": manifest["canvas"], "views": format_views(manifest["views"]),
        "view_seed": manifest["view_seed"], "precision": run["precision"], "micro_batch": run["micro_batch"],
        "threads": run["threads"], "device": device or run["device"], "shard_rows": schema.shard_rows,
        "skip_bad": bool(left_out),
        "encoding": encoding, "methods": layer(manifest["method_options"], settings or {}),
    }  # fmt: skip
    plan = plan_store(build(CacheOptions, fields), watcher)
    differences = compare_manifests({"dataset": plan.manifest["dataset"]}, manifest)
    if differences:
        raise StoreError(f"store '{store}' belongs to another data set: {'; '.join(differences)}")
    return plan if methods is not None else replace(plan, schema=schema)
