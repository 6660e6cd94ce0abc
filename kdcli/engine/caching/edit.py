"""``cache add``, ``cache prune`` and ``cache merge``: what a finished store shall hold, and the way there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcli.data.coco import open_split
from kdcli.engine.caching.plan import StorePlan
from kdcli.engine.caching.verify import plan_of_store
from kdcli.engine.caching.write import write_store
from kdcli.engine.loading.selection import as_stored
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.errors import OptionError, StoreError
from kdcli.methods.resolve import absolute_methods, all_needs, completed, find_methods
from kdcli.store.arrays import StoredTensor
from kdcli.store.image_codec import PIXELS
from kdcli.store.maintenance import copy_rows, drop_tensors, merge_overlay, record_errors, unreferenced_arrays
from kdcli.store.manifest import Manifest, read_manifest
from kdcli.store.provenance import AddedOn, DatasetRecord
from kdcli.store.reader import StoreReader
from kdcli.store.schema import StoreSchema
from kdcli.store.storage.base import Where
from kdcli.store.storage.resolve import open_storage
from kdcli.store.writer import create_store
from kdcli.structures import RowKey
from kdcli.tensors import Need, Region

ADDING = ".adding"  # inside the store: same disk, and gone with it


def add(
    store: Where, data: str | None, teacher: str | None, methods: str, settings: Mapping[str, Mapping[str, Any]],
    encoding: str, reporter: ProgressReporter, images: bool = False, device: str | None = None,
) -> list[str]:  # fmt: skip
    """Add what ``methods`` read and ``store`` lacks, and with ``images`` the cached images; returns the keys of what is new.

    The teacher runs again, but only the new tensors are encoded and written, into a store inside the store that is merged
    when it is complete: until then readers see the old store. For cached images alone it does not run. The same call goes
    on after a kill. ``data`` and ``teacher``: None for where the store was written from; ``device``: None for the kind
    that it was written on. Another one rounds differently: the manifest then says of each new tensor where it was
    computed. Raises StoreError when data or teacher are not those of the manifest, OptionError when the device is not here.
    """
    reader = StoreReader(store)
    folder = reader.storage.local_folder("add to it")
    manifest = reader.manifest
    asked = absolute_methods(methods).split(",") if methods else []
    names = ",".join(dict.fromkeys([*manifest.methods, *asked]))
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
    )
    new = [t.need.key for t in joined.tensors if t.need not in have]
    if joined.images and not reader.schema.images:
        new.append(PIXELS)
    if not new and set(joined.derived_from_dense) <= {*reader.schema.derived_from_dense, *have}:
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
        regions=whole.manifest.regions,
        schema=between,
        added_on=_added_on(reader, whole, [t for t in joined.tensors if t.need not in have], reporter),
    )
    with reader.storage.lock(shared=False):
        overlay = folder / ADDING
        write_store(_plan_of(whole, between, reader.schema), overlay, reporter)
        reporter.stage("merging", reader.schema.num_shards)
        merge_overlay(folder, overlay, merged, reporter.advance)
        if between != joined:
            drop_tensors(folder, replace(read_manifest(folder), schema=joined), reporter.advance)
    return new


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


def prune_tensors(store: Where, keys: Sequence[str], reporter: ProgressReporter) -> list[str]:
    """Drop the tensors ``keys`` from a store, and the methods that read them from its manifest; returns what was dropped.

    ``row/image`` drops the cached images.

    Raises OptionError for a key that the store does not have, or when nothing would be left.
    """
    reader = StoreReader(store)
    folder = reader.storage.local_folder("prune it")
    stored = {t.need.key: t for t in reader.schema.tensors}
    droppable = [*stored, *([PIXELS] if reader.schema.images else [])]
    with reader.storage.lock(shared=False):
        left_over = unreferenced_arrays(folder)  # of a killed call
        unknown = [k for k in keys if k not in droppable]
        if unknown and not left_over:
            raise OptionError(f"store '{store}' has no {', '.join(unknown)}; it has {', '.join(droppable)}")
        keep = [t for key, t in stored.items() if key not in keys]
        if not keep:
            raise OptionError(f"--tensor: nothing would be left of '{store}'; delete the folder instead")
        have = {t.need for t in keep} | {
            n for n in reader.schema.derived_from_dense if n.name in {t.need.name for t in keep}
        }
        options = reader.manifest.method_options
        able = {
            text: name
            for text in reader.manifest.methods
            for name, method in find_methods(text).items()
            if set(method.reads(completed(method, options[name]))) <= have
        }
        reporter.stage("prune", reader.schema.num_shards)
        dense = {t.need.name for t in keep if t.need.dense}
        derived = tuple(n for n in reader.schema.derived_from_dense if n.name in dense)
        images = reader.schema.images and PIXELS not in keys
        schema = replace(reader.schema, tensors=tuple(keep), derived_from_dense=derived, images=images)
        kept = {name: options[name] for name in able.values()}
        added_on = {key: run for key, run in reader.manifest.added_on.items() if key not in keys}
        pruned = replace(reader.manifest, methods=tuple(able), method_options=kept, schema=schema, added_on=added_on)
        drop_tensors(folder, pruned, reporter.advance)
    return [k for k in keys if k in droppable]


def prune_views(store: Where, views: Sequence[str], out: Where, reporter: ProgressReporter) -> int:
    """Copy a store without ``views`` to ``out``; returns the rows of the copy. The same call goes on after a kill."""
    reader = StoreReader(store)
    unknown = [v for v in views if v not in reader.views]
    if unknown:
        raise OptionError(f"store '{store}' has no view {', '.join(unknown)}; it has {', '.join(reader.views)}")
    keep = [v for v in reader.views if v not in views]
    if not keep:
        raise OptionError(f"--view: nothing would be left of '{store}'; delete the folder instead")
    images = np.array(reader.image_ids, np.int64)
    rows = [(0, reader.row_index(RowKey(int(image), view))) for image in images for view in keep]
    return _copy([reader], rows, out, replace(reader.manifest, views=tuple(keep)), images, reporter)


def merge(stores: Sequence[Where], out: Where, data: str | None, reporter: ProgressReporter) -> int:
    """Join stores of one teacher and the same tensors into ``out``: other views of the same images, or other images.

    ``data``: a data set with the images of all of them, needed when they were written from different annotation files; its
    order is the order of the rows. Returns the rows of ``out``. Raises StoreError when they differ, overlap, or do not
    cover ``data``.
    """
    readers = [StoreReader(store) for store in stores]
    first = readers[0]
    for reader in readers[1:]:
        found = reader.manifest.merge_differences(first.manifest)
        if found:
            raise StoreError(f"'{reader.storage}' and '{first.storage}' do not go together: {'; '.join(found)}")
    datasets = [reader.manifest.dataset for reader in readers]
    dataset = datasets[0]
    if data is not None:
        split = as_stored(open_split(Path(data), dataset.split), dataset)
        dataset = DatasetRecord.of(split.fingerprint(), split.split, ())
        everything = split.annotations.image_ids
    elif len({replace(d, left_out=()) for d in datasets}) == 1:
        order = {int(i): None for r in readers for i in r.image_ids}
        everything = np.array(list(order), np.int64)
    else:
        raise OptionError("the stores were written from different annotation files; name the whole set with --data")
    views = list(dict.fromkeys(v for r in readers for v in r.views))
    places: dict[tuple[int, str], tuple[int, int]] = {}
    for k, reader in enumerate(readers):
        for image in reader.image_ids:
            for view in reader.views:
                if (int(image), view) in places:
                    raise StoreError(f"'{reader.storage}' has image {image}, view {view}, that another store has too")
                places[int(image), view] = (k, reader.row_index(RowKey(int(image), view)))
    known = {image for image, _ in places}
    left_out = sorted({i for d in datasets for i in d.left_out} - known)
    images = np.array([i for i in everything if int(i) not in left_out], np.int64)
    missing = [(int(i), v) for i in images for v in views if (int(i), v) not in places]
    foreign = known - {int(i) for i in images}
    if missing or foreign:
        what = (
            f"image {missing[0][0]}, view {missing[0][1]} is in none"
            if missing
            else f"image {min(foreign)} is not in --data"
        )
        raise StoreError(f"the stores do not make a whole one: {what}; every image needs every view")
    rows = [places[int(i), v] for i in images for v in views]
    manifest = replace(
        first.manifest,
        views=tuple(views),
        dataset=replace(dataset, left_out=tuple(left_out)),
        schema=replace(first.schema, max_boxes=max(r.schema.max_boxes for r in readers)),
    )
    return _copy(readers, rows, out, manifest, images, reporter)


def needs_of(store: Where, methods: str) -> tuple[Need, ...]:
    """What ``methods`` read, with the options that the store was written with. Raises OptionError for one it has not."""
    options = read_manifest(store).method_options
    found = find_methods(methods)
    unknown = [name for name in found if name not in options]
    if unknown:
        raise OptionError(f"store '{store}' was not written for {', '.join(unknown)}; it has {', '.join(options)}")
    return all_needs(found, {name: completed(method, options[name]) for name, method in found.items()})


def _copy(
    readers: Sequence[StoreReader], rows: Sequence[tuple[int, int]], out: Where, manifest: Manifest,
    images: NDArray[np.int64], reporter: ProgressReporter,
) -> int:  # fmt: skip
    schema = replace(manifest.schema, rows=len(rows), shard_rows=min(manifest.schema.shard_rows, len(rows)))
    manifest = replace(manifest, schema=schema, errors=None)
    storage = open_storage(out)
    if not storage.exists():
        create_store(storage, manifest, images)
    differences = read_manifest(storage).content_differences(manifest)
    if differences:
        raise StoreError(f"'{storage}' is another store: {'; '.join(differences)}; choose another --out")
    reporter.stage("copying", schema.num_shards)
    with storage.lock(shared=False):
        copy_rows(readers, rows, storage, schema, reporter.advance)
        record_errors(storage)
    return len(rows)
