"""``cache prune`` and ``cache merge``: what a finished store shall hold, and the way there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcli.data.coco import open_split
from kdcli.engine.loading.selection import as_stored
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.errors import OptionError, StoreError
from kdcli.methods.resolve import all_needs, completed, find_methods
from kdcli.store.image_codec import PIXELS
from kdcli.store.locks import lock_folder
from kdcli.store.maintenance import (
    copy_rows,
    drop_tensors,
    record_errors,
    remove_dropped,
    unreferenced_folders,
)
from kdcli.store.manifest import Manifest, name_of, read_manifest
from kdcli.store.provenance import DatasetRecord
from kdcli.store.reader import ADDING, StoreReader
from kdcli.store.storage.base import Where
from kdcli.store.storage.resolve import open_storage
from kdcli.store.writer import create_store
from kdcli.structures import RowKey
from kdcli.tensors import Need


def prune_tensors(store: Where, keys: Sequence[str], reporter: ProgressReporter) -> list[str]:
    """Drop the tensors ``keys`` from a store, and the methods that read them from its manifest; returns what was dropped.

    ``row/image`` drops the cached images.

    Raises OptionError for a key that the store does not have, or when nothing would be left.
    """
    storage = open_storage(store)
    folder = storage.local_folder("prune it")
    read_manifest(storage)  # before its folder is asked for
    with storage.lock(shared=False):  # before anything is read: another call may be changing it
        remove_dropped(folder)
        _require_no_overlay(folder)
        reader = StoreReader(folder)
        stored = {t.need.key: t for t in reader.schema.tensors}
        droppable = [*stored, *([PIXELS] if reader.schema.images else [])]
        left_over = unreferenced_folders(folder)  # of a killed call
        unknown = [k for k in keys if k not in droppable]
        if unknown and not left_over:
            raise OptionError(f"store '{store}' has no {', '.join(unknown)}; it has {', '.join(droppable)}")
        keep = [t for key, t in stored.items() if key not in keys]
        if not keep:
            raise OptionError(f"--tensor: nothing would be left of '{store}'; delete the folder instead")
        have = {t.need for t in keep} | {
            n for n in reader.schema.derived_from_dense if n.name in {t.need.name for t in keep}
        }
        options, needs = reader.manifest.method_options, _method_needs(reader.manifest)
        names = {text: name_of(text) for text in reader.manifest.methods}
        able = {text: name for text, name in names.items() if set(needs[name]) <= {need.key for need in have}}
        reporter.stage("prune", reader.schema.num_shards)
        dense = {t.need.name for t in keep if t.need.dense}
        derived = tuple(n for n in reader.schema.derived_from_dense if n.name in dense)
        images = reader.schema.images and PIXELS not in keys
        schema = replace(reader.schema, tensors=tuple(keep), derived_from_dense=derived, images=images)
        kept = {name: options.get(name, {}) for name in able.values()}
        reads = {name: needs[name] for name in able.values()}
        added_on = {key: run for key, run in reader.manifest.added_on.items() if key not in keys}
        pruned = replace(
            reader.manifest, methods=tuple(able), method_options=kept, method_needs=reads, schema=schema, added_on=added_on
        )  # fmt: skip
        drop_tensors(folder, pruned, reporter.advance)
    return [k for k in keys if k in droppable]


def _method_needs(manifest: Manifest) -> Mapping[str, tuple[str, ...]]:
    """What the methods of a store read, without running one of somebody's where the store says it: not in version 1.

    Raises UsageError for a method of version 1 that is a file, unless that was named to this process.
    """
    if manifest.schema.version > 1:
        return manifest.method_needs
    found = find_methods(",".join(manifest.methods)) if manifest.methods else {}
    options = manifest.method_options
    return {
        n: tuple(need.key for need in method.reads(completed(method, options.get(n, {}))))
        for n, method in found.items()
    }


def _require_no_overlay(folder: Path) -> None:
    """Raises StoreError while an unfinished ``add`` may have moved tensors into the store that its manifest does not name."""
    if (folder / ADDING).exists():
        raise StoreError(
            f"'{folder}' has an unfinished `cache add`; run that again to its end first, or delete '{folder / ADDING}'"
        )


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
    # the rows of an older format do not say which they are: with one such source the copy is of that format too
    version = min(reader.schema.version for reader in readers)
    shard_rows = min(manifest.schema.shard_rows, len(rows))
    schema = replace(manifest.schema, rows=len(rows), shard_rows=shard_rows, version=version)
    manifest = replace(manifest, schema=schema, errors=None)
    storage = open_storage(out)
    with ExitStack() as held:
        for folder in (reader.storage.folder for reader in readers):  # they are not changed meanwhile
            if folder is not None:
                busy = StoreError(f"'{folder}' is being written by another process; wait for it")
                held.enter_context(lock_folder(folder, busy, shared=True))
        with storage.lock_creation():
            if not storage.exists():
                create_store(storage, manifest, images)
        differences = read_manifest(storage).content_differences(manifest)
        if differences:
            raise StoreError(f"'{storage}' is another store: {'; '.join(differences)}; choose another --out")
        held.enter_context(storage.lock(shared=False))
        reporter.stage("copying", schema.num_shards)
        copy_rows(readers, rows, storage, schema, reporter.advance)
        record_errors(storage)
    return len(rows)
