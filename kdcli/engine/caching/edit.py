"""``cache add``, ``cache prune`` and ``cache merge``: what a finished store shall hold, and the way there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcli.data.coco import open_split
from kdcli.engine.caching.plan import StorePlan
from kdcli.engine.caching.verify import plan_of_store
from kdcli.engine.caching.write import MANIFEST_IDENTITY, write_store
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.errors import OptionError, StoreError
from kdcli.methods.resolve import absolute_methods, all_needs, find_methods
from kdcli.store.image_codec import PIXELS
from kdcli.store.locks import lock_store
from kdcli.store.maintenance import copy_rows, drop_tensors, merge_overlay, record_errors, unreferenced_arrays
from kdcli.store.manifest import compare_manifests, read_manifest
from kdcli.store.reader import StoreReader
from kdcli.store.schema import StoreSchema
from kdcli.store.storage.base import Where
from kdcli.store.storage.local import LocalStorage
from kdcli.store.storage.resolve import open_storage
from kdcli.store.writer import create_store
from kdcli.structures import RowKey
from kdcli.tensors import Need

ADDING = ".adding"  # inside the store: same disk, and gone with it


def add(
    store: Where, data: str | None, teacher: str | None, methods: str, settings: Mapping[str, Mapping[str, Any]],
    encoding: str, reporter: ProgressReporter, images: bool = False,
) -> list[str]:  # fmt: skip
    """Add what ``methods`` read and ``store`` lacks, and with ``images`` the pictures; returns the keys of what is new.

    The teacher runs again, but only the new tensors are encoded and written, into a store inside the store that is taken
    in when it is complete: until then readers see the old store. For pictures alone it does not run. The same call goes on
    after a kill. ``data`` and ``teacher``: None for where the store was written from. Raises StoreError when they are not
    those of the manifest.
    """
    reader = StoreReader(store)
    folder = _folder(reader, "add to it")
    manifest = reader.manifest
    origin = manifest["origin"]
    asked = absolute_methods(methods).split(",") if methods else []
    names = ",".join(dict.fromkeys([*_methods(manifest), *asked]))
    whole = plan_of_store(
        store, data or origin["data"], teacher or origin["teacher"], None, reporter, methods=names, settings=settings,
        encoding=encoding,
    )  # fmt: skip
    fixed = {k: v for k, v in manifest.items() if k in MANIFEST_IDENTITY and k != "regions"}
    fixed["teacher"] = {k: v for k, v in fixed["teacher"].items() if k != "ap"}
    differences = compare_manifests(fixed, whole.manifest)
    if differences:
        raise StoreError(f"store '{store}' is another one: {'; '.join(differences)}; use the teacher that wrote it")
    have = {t.need: t for t in reader.schema.tensors}
    joined = replace(
        whole.schema,
        tensors=tuple(have.get(t.need, t) for t in whole.schema.tensors),
        shard_rows=reader.schema.shard_rows,
        images=reader.schema.images or images,
    )
    new = [t.need.key for t in joined.tensors if t.need not in have]
    if joined.images and not reader.schema.images:
        new.append(PIXELS)
    if not new and set(joined.derived_from_dense) <= {*reader.schema.derived_from_dense, *have}:
        reporter.message(f"{store}: has everything that {methods or 'training from pictures'} read(s)")
        return []
    # what was sparse and is now derived from a new dense tensor goes last, so that it is there until then
    between = replace(
        joined, tensors=(*joined.tensors, *(t for n, t in have.items() if n in joined.derived_from_dense))
    )
    between = replace(between, derived_from_dense=tuple(n for n in joined.derived_from_dense if n not in have))
    changes = {k: whole.manifest[k] for k in ("methods", "method_options", "regions")}
    with lock_store(folder, shared=False):
        overlay = folder / ADDING
        write_store(_plan_of(whole, between, reader.schema), overlay, reporter)
        reporter.stage("taking in", reader.schema.num_shards)
        merge_overlay(folder, overlay, between, changes, reporter.advance)
        if between != joined:
            drop_tensors(folder, joined, {}, reporter.advance)
    return new


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
    return replace(whole, options=options, needs=needs, schema=schema, source=source)


def prune_tensors(store: Where, keys: Sequence[str], reporter: ProgressReporter) -> list[str]:
    """Drop the tensors ``keys`` from a store, and the methods that read them from its manifest; returns what was dropped.

    ``row/image`` drops the pictures.

    Raises OptionError for a key that the store does not have, or when nothing would be left.
    """
    reader = StoreReader(store)
    folder = _folder(reader, "prune it")
    stored = {t.need.key: t for t in reader.schema.tensors}
    droppable = [*stored, *([PIXELS] if reader.schema.images else [])]
    with lock_store(folder, shared=False):
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
        options = reader.manifest["method_options"]
        texts = _methods(reader.manifest)  # as given: a user's method is a path
        able = {
            text: name
            for text in texts
            for name, method in find_methods(text).items()
            if set(method.reads(options[name])) <= have
        }
        reporter.stage("prune", reader.schema.num_shards)
        changes = {"methods": ",".join(able), "method_options": {name: options[name] for name in able.values()}}
        dense = {t.need.name for t in keep if t.need.dense}
        derived = tuple(n for n in reader.schema.derived_from_dense if n.name in dense)
        images = reader.schema.images and PIXELS not in keys
        schema = replace(reader.schema, tensors=tuple(keep), derived_from_dense=derived, images=images)
        drop_tensors(folder, schema, changes, reporter.advance)
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
    manifest = {**reader.manifest, "views": keep}
    return _copy([reader], rows, out, manifest, reader.schema, images, reporter)


def merge(stores: Sequence[Where], out: Where, data: str | None, reporter: ProgressReporter) -> int:
    """Join stores of one teacher and the same tensors into ``out``: other views of the same images, or other images.

    ``data``: a data set with the images of all of them, needed when they were written from different annotation files; its
    order is the order of the rows. Returns the rows of ``out``. Raises StoreError when they differ, overlap, or do not
    cover ``data``.
    """
    readers = [StoreReader(store) for store in stores]
    first = readers[0]
    differing = {"dataset", "views"}
    ours = {k: first.manifest[k] for k in MANIFEST_IDENTITY if k not in differing}
    whole = {"images": None, **first.schema.to_json()}
    shape = {k: v for k, v in whole.items() if k not in ("rows", "shard_rows", "max_boxes")}
    for reader in readers[1:]:
        found = compare_manifests({**ours, "schema": shape}, reader.manifest)
        if reader.manifest["dataset"]["categories"] != first.manifest["dataset"]["categories"]:
            found.append("dataset.categories")
        if found:
            raise StoreError(f"'{reader.storage}' and '{first.storage}' do not go together: {'; '.join(found)}")
    dataset = {k: v for k, v in first.manifest["dataset"].items() if k != "left_out"}
    same_data = all(compare_manifests(dataset, r.manifest["dataset"]) == [] for r in readers[1:])
    if data is not None:
        split = open_split(Path(data), first.manifest["dataset"]["split"])
        dataset = {**split.fingerprint(), "split": split.split}
        everything = split.annotations.image_ids
    elif same_data:
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
    left_out = sorted({i for r in readers for i in r.manifest["dataset"]["left_out"]} - known)
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
    manifest = {**first.manifest, "views": views, "dataset": {**dataset, "left_out": left_out}}
    schema = replace(first.schema, max_boxes=max(r.schema.max_boxes for r in readers))
    return _copy(readers, rows, out, manifest, schema, images, reporter)


def needs_of(store: Where, methods: str) -> tuple[Need, ...]:
    """What ``methods`` read, with the options that the store was written with. Raises OptionError for one it has not."""
    manifest = read_manifest(store)
    options = manifest["method_options"]
    found = find_methods(methods)
    unknown = [name for name in found if name not in options]
    if unknown:
        raise OptionError(f"store '{store}' was not written for {', '.join(unknown)}; it has {', '.join(options)}")
    return all_needs(found, options)


def _folder(reader: StoreReader, verb: str) -> Path:
    """Where a store that is changed in place is. Raises OptionError for an object store."""
    if not isinstance(reader.storage, LocalStorage):
        raise OptionError(
            f"'{reader.storage}' is in an object store, where nothing can be moved or locked: copy the store to a disk "
            f"first, {verb} there, and copy it back"
        )
    return reader.storage.path


def _methods(manifest: Mapping[str, Any]) -> list[str]:
    return [text for text in str(manifest["methods"]).split(",") if text]


def _copy(
    readers: Sequence[StoreReader], rows: Sequence[tuple[int, int]], out: Where, manifest: dict[str, Any],
    schema: StoreSchema, images: NDArray[np.int64], reporter: ProgressReporter,
) -> int:  # fmt: skip
    schema = replace(schema, rows=len(rows), shard_rows=min(schema.shard_rows, len(rows)))
    manifest = {k: v for k, v in manifest.items() if k not in ("schema", "errors")}
    storage = open_storage(out)
    if storage.exists():
        differences = compare_manifests(
            {**manifest, "schema": {"images": None, **schema.to_json()}}, read_manifest(storage)
        )
        if differences:
            raise StoreError(f"'{storage}' is another store: {'; '.join(differences)}; choose another --out")
    else:
        create_store(storage, schema, manifest, images)
    reporter.stage("copying", schema.num_shards)
    with lock_store(storage.path, shared=False) if isinstance(storage, LocalStorage) else nullcontext():
        copy_rows(readers, rows, storage, schema, reporter.advance)
        record_errors(storage)
    return len(rows)
