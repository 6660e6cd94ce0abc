"""``cache verify``: every checksum of a store, and the teacher run again on some of its rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import zarr
from zarr.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from kdcli.data.views import format_views
from kdcli.detectors.read import AT_PROPOSALS
from kdcli.engine.caching.plan import StorePlan, plan_store
from kdcli.engine.loading.region_check import recheck_regions, spread
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.errors import KDError, StoreError
from kdcli.options import CacheOptions, build, layer
from kdcli.store.arrays import shard_key
from kdcli.store.batch_buffers import collate_arrays
from kdcli.store.encoding_error import ErrorMeter, summarise
from kdcli.store.journal import ShardRecord, journal_key, read_journal
from kdcli.store.manifest import read_manifest
from kdcli.store.reader import StoreReader
from kdcli.store.schema import row_tensor
from kdcli.store.storage.base import Storage, Where
from kdcli.store.writer import make_arrays
from kdcli.structures import RowKey


def verify_checksums(store: Where, reporter: ProgressReporter) -> tuple[int, int]:
    """Compare every shard file with the digest in the journal, and every row with the image that it is of.

    Returns (files, bytes). Raises StoreError naming the first file that is missing, torn, changed or of another store. In
    format version 1 the digest is a crc32c, which is the same for any rows of the same lengths.
    """
    reader = StoreReader(store)  # complete, and of a schema that can be read
    storage, layout = reader.storage, reader.layout
    verify_headers(reader)
    journal = read_journal(storage, reader.manifest)
    reporter.stage("verify", len(journal) * len(layout))
    files = total = 0
    for shard, entry in sorted(journal.items()):
        for array, spec in layout.items():
            key = shard_key(spec, shard)
            try:
                data = storage.read(key)
            except FileNotFoundError as error:
                if isinstance(error, KDError):  # no such bucket
                    raise
                raise StoreError(f"shard file '{storage}/{key}' is missing; {_again(storage, shard)}") from error
            if ShardRecord.of(data, reader.schema.version) != entry.files[array]:
                raise StoreError(f"shard file '{storage}/{key}' is not what was written; {_again(storage, shard)}")
            files += 1
            total += len(data)
            reporter.advance(1)
    rows = reader.restricted((), pixels=False)
    reporter.stage("rows", reader.schema.rows)
    for image in reader.image_ids:  # the array of them is in no shard
        for view in reader.views:
            rows.read(RowKey(image, view))
        reporter.advance(len(reader.views))
    return files, total


def verify_headers(reader: StoreReader) -> None:
    """The zarr.json of every array and group says what the schema does: other readers of Zarr go by it. Raises StoreError.

    Byte for byte if the zarr-python that wrote the store is the one here, else as zarr-python understands it.
    """
    root = reader.storage.read("zarr.json")
    if json.dumps(json.loads(root), indent=2).encode() != root:  # what it says is right, or there were no reader
        raise StoreError(f"'{reader.storage}/zarr.json' is not what was written; write the store again")
    fresh = MemoryStore()
    make_arrays(fresh, reader.schema, np.array(reader.image_ids, np.int64))
    same_zarr = reader.manifest.versions.get("zarr") == zarr.__version__
    groups = {str(parent) for path in reader.layout for parent in PurePosixPath(path).parents} - {"."}
    for path in (*reader.layout, "image_id", *sorted(groups)):
        key = f"{path}/zarr.json"
        try:
            data, wanted = reader.storage.read(key), fresh._store_dict[key].to_bytes()
            if b'"level": -1' not in data:  # of a store from before features had that one; any reader decodes both
                wanted = wanted.replace(b'"level": -1', b'"level": 1')
            same = data == wanted if same_zarr else _metadata(data, path in groups) == _metadata(wanted, path in groups)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError, OSError) as error:
            if isinstance(error, KDError):  # all the others zarr may raise
                raise
            same = False
        if not same:
            raise StoreError(f"'{reader.storage}/{key}' is not what was written; write the store again")


def _metadata(data: bytes, group: bool) -> Any:
    """What zarr-python makes of a zarr.json."""
    alone = MemoryStore({"zarr.json": Buffer.from_bytes(data)})
    opened: Any = zarr.open_group(alone, mode="r") if group else zarr.open_array(alone, mode="r")
    return opened.metadata.to_dict()


def verify_teacher(
    plan: StorePlan, store: Where, rows: int, reporter: ProgressReporter
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run the teacher again on ``rows`` evenly spaced rows and compare; returns (rows compared, error per tensor).

    Raises StoreError when the teacher is not the one of the manifest.
    """
    reader = StoreReader(store)
    stored, here = (manifest.teacher.weights_sha256 for manifest in (reader.manifest, plan.manifest))
    if stored != here:
        raise StoreError(f"store '{store}' was written by another teacher: weights_sha256: store {stored}, here {here}")
    recheck_regions(plan.source, reader, plan.positions, plan.views)
    chosen = spread(plan.positions, plan.views, rows)
    reporter.stage("teacher again", len(chosen))
    meter = ErrorMeter()
    for item in chosen:
        sample = plan.source.load(item)
        row = reader.read(RowKey(plan.source.dataset.image_id(item[0]), item[1]))
        plan.source.check_row(row, sample)
        decoded = reader.schema.decode(collate_arrays([row.arrays], reader.layout.values()), plan.needs)
        boxes = decoded.get(AT_PROPOSALS[0].key)  # at which the RoI head is read again
        at = None if boxes is None else [boxes.to(plan.teacher.device)]
        values = plan.teacher.rows([sample], plan.needs, at)
        for tensor in plan.schema.tensors:
            key, exact = tensor.need.key, values[0][tensor.need.key]
            theirs = row_tensor(decoded[key])
            theirs = theirs[0] if theirs.ndim > exact.ndim else theirs
            if theirs.shape != exact.shape:
                raise StoreError(f"{RowKey(plan.source.dataset.image_id(item[0]), item[1])}: its regions have changed")
            keep = plan.schema.valid_rows(tensor, sample.valid).numpy() if tensor.need.dense else None
            meter.add(key, exact, theirs, keep)
        reporter.advance(1)
    return len(chosen), summarise([meter.sums])


def _again(storage: Storage, shard: int) -> str:
    return f"delete '{storage}/{journal_key(shard)}' and run the same cache-teacher command again: it writes this shard anew"


def plan_of_store(
    store: Where, data: str, teacher: str, device: str | None, reporter: ProgressReporter, *, methods: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None, encoding: str = "default", runs: bool = True,
) -> StorePlan:  # fmt: skip
    """The plan that wrote ``store``, rebuilt from its manifest with the given data set and teacher.

    ``device``: None for the one that wrote the store. With ``methods`` and ``settings`` (options of methods), the plan of a
    store of these; without, of its tensors, whatever methods they are for. ``runs``: False for a plan whose teacher will not
    run, which then needs neither its device nor a compiler. Raises StoreError when the data set is not that of the manifest,
    OptionError when the device is not here.
    """
    manifest = read_manifest(store)
    schema, run, dataset = manifest.schema, manifest.teacher_run, manifest.dataset
    fields = {
        "data": data, "teacher": teacher, "method": methods or "",
        "split": dataset.split, "canvas": str(schema.canvas), "views": format_views(manifest.views),
        "view_seed": manifest.view_seed, "precision": run.precision, "micro_batch": run.micro_batch,
        "threads": run.threads, "device": (device or run.device) if runs else "cpu",
        "compile": runs and bool(run.compile), "shard_rows": schema.shard_rows, "skip_bad": bool(dataset.left_out),
        "exif": "apply" if dataset.exif is None else "ignore", "clip_boxes": dataset.boxes is not None,
        "encoding": encoding, "methods": layer(manifest.method_options, settings or {}) if methods else {},
    }  # fmt: skip
    plan = plan_store(build(CacheOptions, fields), reporter)
    differences = dataset.differences(plan.manifest.dataset)
    if differences:
        raise StoreError(f"store '{store}' belongs to another data set: {'; '.join(differences)}")
    if methods is not None:
        return plan
    # a pruned store has tensors that no method of it reads any more
    source = plan.source.with_regions(manifest.region_spec, schema.regions)
    needs = tuple(t.need for t in schema.tensors)
    ours = replace(
        plan.manifest, methods=manifest.methods, method_options=manifest.method_options,
        method_needs=manifest.method_needs, regions=manifest.regions, schema=schema,
    )  # fmt: skip
    return replace(plan, manifest=ours, needs=needs, source=source)
