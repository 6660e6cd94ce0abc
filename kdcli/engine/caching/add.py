"""``cache add``: tensors of more methods, or the cached images, into a finished store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kdcli.data.images import file_digest
from kdcli.engine.caching.plan import StorePlan
from kdcli.engine.caching.verify import plan_of_store, verify_headers
from kdcli.engine.caching.write import write_store
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.errors import StoreError
from kdcli.methods.resolve import stored_methods
from kdcli.store.arrays import StoredTensor
from kdcli.store.image_codec import PIXELS
from kdcli.store.journal import read_journal
from kdcli.store.maintenance import drop_tensors, merge_overlay, remove_dropped, remove_overlay
from kdcli.store.manifest import read_manifest
from kdcli.store.provenance import AddedOn
from kdcli.store.reader import ADDING, StoreReader
from kdcli.store.schema import StoreSchema
from kdcli.store.storage.base import Where
from kdcli.store.storage.resolve import open_storage
from kdcli.structures import RowKey
from kdcli.tensors import Region


def add(
    store: Where, data: str | None, teacher: str | None, methods: str, settings: Mapping[str, Mapping[str, Any]],
    encoding: str, reporter: ProgressReporter, images: bool = False, device: str | None = None,
) -> list[str]:  # fmt: skip
    """Add what ``methods`` read and ``store`` lacks, and with ``images`` the cached images; returns the keys of what is new.

    The teacher runs again, but only the new tensors are encoded and written, into a store inside the store that is merged
    when it is complete: until then readers see the old store. For cached images alone it does not run. The same call goes
    on after a kill. ``data`` and ``teacher``: None for where the store was written from; ``device``: None for the kind
    that it was written on. Another one rounds differently: the manifest then says of each new tensor where it was
    computed. Raises UsageError when a method of the store is of a file that was not named to this process,
    StoreError when data or teacher are not those of the manifest, OptionError when the device is not here.
    """
    storage = open_storage(store)
    folder = storage.local_folder("add to it")
    read_manifest(storage)  # before its folder is asked for
    with storage.lock(shared=False):  # before anything is read: another call may be changing it
        remove_dropped(folder)
        return _add(folder, data, teacher, methods, settings, encoding, reporter, images, device)


def _add(
    folder: Path, data: str | None, teacher: str | None, methods: str, settings: Mapping[str, Mapping[str, Any]],
    encoding: str, reporter: ProgressReporter, images: bool, device: str | None,
) -> list[str]:  # fmt: skip
    store, reader = folder, StoreReader(folder)
    manifest, overlay = reader.manifest, folder / ADDING
    asked = stored_methods(methods)
    names = ",".join(dict.fromkeys([*stored_methods(",".join(manifest.methods)), *asked]))
    whole = plan_of_store(
        store, data or manifest.origin.data, teacher or manifest.origin.teacher, device, reporter,
        methods=names if asked else None, settings=settings, encoding=encoding, runs=bool(asked),
    )  # fmt: skip
    # which device, and with it how many threads, is the user's to say; without tensors to add nothing is computed
    ours = whole.manifest
    run = manifest.teacher_run
    if asked:
        run = replace(ours.teacher_run, device=run.device, threads=run.threads)
    differences = manifest.differences(replace(ours, teacher_run=run), ignoring=("regions", "schema"))
    if differences:
        raise StoreError(f"store '{store}' is another one: {'; '.join(differences)}; use the teacher that wrote it")
    changed = manifest.region_differences(ours)
    if reader.schema.regions - {Region.MAIN} and changed:
        raise StoreError(f"store '{store}' has tensors in other regions: {'; '.join(changed)}; write another store")
    have = {t.need: t for t in reader.schema.tensors}
    derived = {*whole.schema.derived_from_dense, *reader.schema.derived_from_dense}
    # those of a pruned store that no method reads stay
    tensors = {t.need: t for t in whole.schema.tensors} | {n: t for n, t in have.items() if n not in derived}
    joined = replace(
        whole.schema,
        tensors=tuple(tensors[need] for need in sorted(tensors)),
        derived_from_dense=tuple(sorted(derived)),
        shard_rows=reader.schema.shard_rows,
        images=reader.schema.images or images,
        version=reader.schema.version,
    )
    new = [t.need.key for t in joined.tensors if t.need not in have]
    if joined.images and not reader.schema.images:
        new.append(PIXELS)
    finishing = not new and _is_merged(overlay, reader)
    if not new and not finishing and set(joined.derived_from_dense) <= {*reader.schema.derived_from_dense, *have}:
        reporter.message(f"{store}: has everything that {methods or 'training from cached images'} read(s)")
        return []
    # what was sparse and is now derived from a new dense tensor goes last, so that it is there until then
    between = replace(
        joined, tensors=(*joined.tensors, *(t for n, t in have.items() if n in joined.derived_from_dense))
    )
    between = replace(between, derived_from_dense=tuple(n for n in joined.derived_from_dense if n not in have))
    merged = replace(
        manifest,
        methods=whole.manifest.methods,
        method_options=whole.manifest.method_options,
        method_needs=whole.manifest.method_needs,
        regions=whole.manifest.regions,
        schema=between,
        added_on=_added_on(reader, whole, [t for t in joined.tensors if t.need not in have], reporter),
    )
    plan = _plan_of(whole, between, reader.schema)
    _require_same_overlay(plan, overlay)
    if new:
        if not _is_complete(overlay):  # else a killed call has begun to move it into the store, where rows are of both
            verify_headers(reader)  # else the end of the merge may find that it cannot be done
            _require_same_images(plan, reader, reporter)
        write_store(plan, overlay, reporter)
        reporter.stage("merging", reader.schema.num_shards)
        merge_overlay(folder, overlay, merged, reporter.advance)
    if between != joined or finishing:
        drop_tensors(folder, replace(read_manifest(folder), schema=joined), reporter.advance)
    remove_overlay(folder, overlay)
    return new


def _require_same_images(plan: StorePlan, reader: StoreReader, reporter: ProgressReporter) -> None:
    """Raises StoreError for the first image file that is not the one that the teacher saw when the store was written.

    Its old tensors would stay beside new ones. Reading COCO once more takes minutes, the teacher hours.
    """
    rows, dataset = reader.restricted((), pixels=False), plan.source.dataset
    reporter.stage("images", len(plan.positions))
    for position in map(int, plan.positions):
        content = file_digest(dataset.image_path(position))
        for view in reader.views:
            key = RowKey(dataset.image_id(position), view)
            row = rows.read(key)
            if row.content != content:
                raise StoreError(
                    f"{key}: '{dataset.image_path(position)}' is not the file that the teacher saw when the store was "
                    "written; put that one back, or write the store again"
                )
            if not np.array_equal(row.geometry, plan.source.geometry((position, view)).to_array()):
                raise StoreError(f"{key}: its view is not the one that the teacher saw; write the store again")
        reporter.advance(1)


def _is_complete(overlay: Path) -> bool:
    """Whether all shards of ``overlay`` are written."""
    return overlay.exists() and len(read_journal(overlay)) == read_manifest(overlay).schema.num_shards


def _is_merged(overlay: Path, reader: StoreReader) -> bool:
    """Whether a killed call left ``overlay`` after all of it had become part of the store."""
    if not overlay.exists():
        return False
    added = read_manifest(overlay).schema
    return {t.need for t in added.tensors} <= {t.need for t in reader.schema.tensors} and (
        reader.schema.images or not added.images
    )


def _require_same_overlay(plan: StorePlan, overlay: Path) -> None:
    """Raises StoreError when a killed call for other methods has begun ``overlay``: what it computed is not thrown away."""
    if not overlay.exists():
        return
    differences = read_manifest(overlay).differences(plan.manifest)
    if differences and plan.needs:
        raise StoreError(
            f"'{overlay.parent}' has an unfinished `cache add` of other tensors ({'; '.join(differences)}); run that to its "
            f"end first, or delete '{overlay}'"
        )


def _added_on(
    reader: StoreReader, whole: StorePlan, new: Sequence[StoredTensor], reporter: ProgressReporter
) -> dict[str, AddedOn]:
    """What the manifest has to say of tensors that were computed on another device than the store: those of before and
    ``new`` ones.

    Raises StoreError when they belong to the store's proposals: those of another device may be others.
    """
    before = dict(reader.manifest.added_on)
    wrote, run = reader.manifest.teacher_run.device, whole.manifest.teacher_run
    here = run.device
    if not new or here == wrote:
        return before
    stored = [t.need.key for t in reader.schema.tensors if t.need.region == Region.PROPOSALS]
    if stored and any(t.need.region == Region.PROPOSALS for t in new):
        raise StoreError(
            f"store '{reader.storage}' has {', '.join(stored)}, computed on {wrote}; on {here} the proposals may be others: "
            f"add to it with --device {wrote}, or write another store"
        )
    reporter.message(
        f"{reader.storage}: what is added is computed on {here}, what is there was on {wrote}; they round differently, and "
        "the manifest says which is which"
    )
    return before | {t.need.key: AddedOn(device=here, threads=run.threads) for t in new}


def _plan_of(whole: StorePlan, joined: StoreSchema, stored: StoreSchema) -> StorePlan:
    """The plan of a store of what ``stored`` lacks of ``joined``; where it has entries, with the regions of both."""
    have = {t.need for t in stored.tensors} | set(stored.derived_from_dense)
    schema = replace(
        joined,
        tensors=tuple(t for t in joined.tensors if t.need not in have),
        derived_from_dense=tuple(n for n in joined.derived_from_dense if n not in have),
        images=joined.images and not stored.images,
    )
    needs = tuple(t.need for t in schema.tensors)
    # the AP of the teacher is known; measuring it again would take a pass over val
    options = replace(whole.options, min_teacher_ap=0.0)
    regions = joined.regions if schema.sparse else frozenset()
    source = whole.source.with_regions(whole.source.region_spec, regions)
    return replace(whole.with_schema(schema), options=options, needs=needs, source=source)
