"""Plans a store: what it is, from the teacher, the data and the methods; and how a sample becomes a row."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdcli.data.coco import open_split
from kdcli.data.reading import Reading
from kdcli.data.views import parse_views
from kdcli.detectors.build import default_keys
from kdcli.detectors.features import require_head
from kdcli.detectors.weights import load_detector
from kdcli.engine.loading.samples import Item, SampleSource
from kdcli.engine.loading.selection import require_boxes_on, usable
from kdcli.engine.runtime.device import pick_device
from kdcli.engine.runtime.distributed import take_local_gpu
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.engine.runtime.threads import pick_teacher_workers, set_threads
from kdcli.engine.teacher.forward import TeacherForward, TeacherRunner, class_order, compiled
from kdcli.engine.teacher.specs import region_spec, teacher_record, with_classes
from kdcli.methods.base import Pair
from kdcli.methods.resolve import all_needs, check_pair, find_methods, require_known, resolve_all, stored_methods
from kdcli.options import CacheOptions
from kdcli.store.encoding_policy import derived_from_dense, plan_tensors, shard_rows_for
from kdcli.store.manifest import Manifest
from kdcli.store.provenance import DatasetRecord, Origin, TeacherRun
from kdcli.store.schema import StoreSchema, regions_of
from kdcli.structures import Canvas
from kdcli.tensors import Need


@dataclass(frozen=True, kw_only=True)
class StorePlan:
    """A store that could be written: what it is, and the teacher that would fill it."""

    options: CacheOptions
    teacher: TeacherRunner
    source: SampleSource
    positions: NDArray[np.int64]
    views: tuple[str, ...]
    needs: tuple[Need, ...]  # that are stored
    manifest: Manifest  # the AP of its teacher may still be None
    chosen: tuple[Item, ...] | None = None  # the rows of a trial store; None: every image in every view

    @property
    def schema(self) -> StoreSchema:
        """The arrays of the store."""
        return self.manifest.schema

    def with_schema(self, schema: StoreSchema) -> StorePlan:
        """The plan of a store of other arrays."""
        return replace(self, manifest=replace(self.manifest, schema=schema))

    def item(self, row: int) -> Item:
        """Image and view of a row: the views of an image lie side by side."""
        if self.chosen is not None:
            return self.chosen[row]
        position, view = divmod(row, len(self.views))
        return int(self.positions[position]), self.views[view]


def plan_store(options: CacheOptions, reporter: ProgressReporter) -> StorePlan:
    """Everything about a store but its rows; reads the annotations and the teacher, writes nothing."""
    threads = set_threads(options.threads)
    if "LOCAL_RANK" in os.environ and options.device != "cpu" and torch.cuda.is_available():
        take_local_gpu()
    device = pick_device(options.device)
    detector, meta = load_detector(options.teacher)
    if options.min_teacher_ap:
        require_head(detector, "--min-teacher-ap")
    dataset = open_split(Path(options.data), options.split)
    order = class_order(meta.classes, dataset.classes)
    specs = with_classes(detector.specs(), len(order))
    canvas = Canvas.parse(options.canvas or meta.canvas)
    views = parse_views(options.views)
    methods = find_methods(options.method) if options.method else {}  # a pruned store may have none left
    require_known(options.methods, methods)
    keys = default_keys(detector.spec.detector)
    pair = Pair(specs, specs, detector.grid, canvas, keys[-1])
    resolved = resolve_all(methods, keys, options.methods, detector.region_defaults)
    for name, method in methods.items():
        check_pair(name, method, resolved[name], pair, detector.spec.name, detector.spec.name)
    needs = all_needs(methods, resolved)
    reading = Reading(options.exif, options.clip_boxes)
    used = usable(dataset, options.skip_bad, reporter, reading=reading, trains=True)
    dataset, positions = used.dataset, used.positions
    require_boxes_on(dataset, positions, canvas, reporter)
    source = SampleSource.for_caching(
        dataset, canvas, detector, view_seed=options.view_seed,
        region_spec=region_spec(detector.region_defaults, methods, resolved), regions=regions_of(needs),
    )  # fmt: skip
    derived = derived_from_dense(needs, options.encoding)
    stored = tuple(n for n in needs if n not in derived)
    schema = StoreSchema(
        grid=detector.grid, canvas=canvas, rows=len(positions) * len(views), shard_rows=1,
        tensors=plan_tensors(stored, specs, options.encoding),
        max_boxes=max((len(dataset.training_boxes(int(p))[0]) for p in positions), default=0), derived_from_dense=derived,
        images=options.cache_images,
    )  # fmt: skip
    row_bytes = sum(a.row_bytes for a in schema.layout())
    schema = replace(schema, shard_rows=min(options.shard_rows or shard_rows_for(row_bytes), schema.rows))
    left_out = sorted(dataset.image_id(i) for i in set(range(dataset.num_images)) - set(positions.tolist()))
    manifest = Manifest(
        teacher=teacher_record(detector, meta.weights_sha256),
        teacher_run=TeacherRun(
            precision=options.precision,
            micro_batch=options.micro_batch,
            device=device.type,
            threads=threads if device.type == "cpu" else None,
            compile=options.compile or None,
        ),
        dataset=DatasetRecord.of(dataset.fingerprint(), dataset.split, tuple(left_out)),
        class_order=tuple(order),
        views=views,
        view_seed=source.view_seed,
        assigner=source.assigner.to_json(),
        regions=source.region_spec.to_json(),
        versions={name: version(name) for name in ("kdcli", "torch", "torchvision", "zarr")},
        methods=stored_methods(options.method),
        method_options=resolved,
        method_needs={
            name: tuple(need.key for need in sorted(set(m.reads(resolved[name])))) for name, m in methods.items()
        },
        origin=Origin(data=str(Path(options.data).resolve()), teacher=str(Path(options.teacher).resolve())),
        schema=schema,
        added_on={},
    )
    detector = detector.to(device).to(memory_format=torch.channels_last)
    forward = TeacherForward(detector.eval(), order, options.micro_batch, options.precision)
    if options.compile:
        forward = compiled(forward, canvas)
    return StorePlan(
        options=options, source=source, positions=positions, views=views, needs=stored, manifest=manifest,
        teacher=TeacherRunner(forward, device, pick_teacher_workers(options.workers, device)),
    )  # fmt: skip
