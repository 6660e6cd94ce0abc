"""Binds a teacher, live or stored, to a student: what each method needs, checked against what both sides are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcli.data.coco import Dataset
from kdcli.detectors.base import Detector
from kdcli.detectors.build import default_keys, family_of
from kdcli.detectors.weights import load_detector
from kdcli.engine.loading.region_check import recheck_regions
from kdcli.engine.loading.samples import SampleSource, region_definition
from kdcli.engine.teacher import forward as teachers
from kdcli.engine.teacher.match import require_match, require_strides
from kdcli.engine.teacher.specs import TeacherSide, region_spec, specs_of, with_classes
from kdcli.errors import OptionError, StoreError
from kdcli.methods.base import Method, Pair
from kdcli.methods.resolve import all_needs, check_pair, resolve_all
from kdcli.options import TrainOptions
from kdcli.store.encoding_policy import plan_tensors
from kdcli.store.journal import store_digest
from kdcli.store.reader import StoreReader
from kdcli.store.schema import StoreSchema, regions_of
from kdcli.store.storage.base import Where
from kdcli.structures import Canvas
from kdcli.tensors import Need


@dataclass(frozen=True, kw_only=True)
class BoundTeacher:
    """A teacher that fits: the callable of the loop, the methods, and where their tensors are read."""

    forward: teachers.Teacher
    methods: dict[str, Method]
    source: SampleSource
    ap: float | None
    sha256: str
    store_hash: str | None = None
    store_bytes: int | None = None


def open_teacher(options: TrainOptions, train: Dataset) -> TeacherSide:
    """The store of ``--cache`` or the checkpoint of ``--teacher``. Raises OptionError for both or none."""
    if bool(options.cache) == bool(options.teacher):
        raise OptionError("distill takes either --cache STORE or --teacher CKPT (the live teacher), not both or none")
    if options.cache:
        return stored_teacher(options.cache)
    detector, meta = load_detector(str(options.teacher))
    ap = meta.extra.get("ap")
    return TeacherSide(
        name=detector.spec.name, specs=with_classes(detector.specs(), len(train.classes)),
        canvas=Canvas.parse(meta.canvas), views=None, ap=ap if isinstance(ap, float) else None,
        sha256=meta.weights_sha256, detector=detector, meta=meta,
    )  # fmt: skip


def stored_teacher(where: Where) -> TeacherSide:
    """The teacher of the store at ``where``. Raises as StoreReader does."""
    reader = StoreReader(where)
    teacher = reader.manifest.teacher
    return TeacherSide(
        name=teacher.name, specs=specs_of(reader.manifest), canvas=reader.schema.canvas, views=reader.views,
        ap=teacher.ap, sha256=teacher.weights_sha256, reader=reader,
    )  # fmt: skip


def inherit_regions(
    resolved: Mapping[str, Mapping[str, Any]], methods: Mapping[str, type[Method]], reader: StoreReader,
    given: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """A store's region options are the run's, unless the user ``given`` others (which then do not match)."""
    stored = reader.manifest.region_spec.to_json()
    return {
        name: {**values, **{o: stored[o] for o in methods[name].region_options if o not in given.get(name, {})}}
        for name, values in resolved.items()
    }


def written_otherwise(
    resolved: Mapping[str, Mapping[str, Any]], methods: Mapping[str, type[Method]], reader: StoreReader,
    given: Mapping[str, Mapping[str, Any]],
) -> list[str]:  # fmt: skip
    """A line for each method whose options the user left to default and that a store's manifest has otherwise.

    By another default of its day, or by ``cache-teacher --set``. What a store holds does not depend on the rules that the
    student is trained by, so the run takes none over but region options: see ``inherit_regions``.
    """
    lines = []
    for name, values in resolved.items():
        stored = reader.manifest.method_options.get(name, {})
        left = [o for o in values if o not in given.get(name, {}) and o not in methods[name].region_options]
        other = [
            f"{o} = {values[o]} (the store says {stored[o]})" for o in left if o in stored and stored[o] != values[o]
        ]
        if other:
            lines.append(f"{name}: the run takes {', '.join(other)}; of a store it takes over regions alone")
    return lines


def bind_teacher(
    side: TeacherSide, student: Detector, methods: Mapping[str, type[Method]], options: TrainOptions,
    source: SampleSource, positions: NDArray[np.int64], views: Sequence[str], device: torch.device,
) -> BoundTeacher:  # fmt: skip
    """Build the methods and the teacher's callable.

    Raises OptionError when a method cannot work on the two models, and StoreError when the store is another one, lacks
    a tensor, or its regions are not those computed here.
    """
    pair = Pair(student.specs(), side.specs, student.grid, source.canvas, family_of(student.spec.detector))
    for name, method in methods.items():
        check_pair(name, method, options.methods[name], pair, student.spec.name, side.name)
    built = {name: method(pair, **options.methods[name]) for name, method in methods.items()}
    needs = all_needs(methods, options.methods)
    require_strides(side, student)
    base = side.reader.manifest.region_spec if side.reader else student.region_defaults
    source = source.with_regions(region_spec(base, methods, options.methods), regions_of(needs))
    aligned = any(m.index_aligned for m in methods.values())
    if side.reader is not None:
        gone = set(side.reader.manifest.dataset.left_out)
        wanted = sorted(gone & {source.dataset.image_id(int(p)) for p in positions}) if gone else []
        if wanted:
            raise StoreError(
                f"store '{side.reader.storage}' was written without {len(wanted)} images of this run, the first is image "
                f"{wanted[0]}; train with --skip-bad too, or write the store again"
            )
        index_space = (student.grid, student.assigner, source.region_spec) if aligned else None
        require_match(side.reader, source.dataset, source.canvas, views, index_space)
        reader = _reader_for(side.reader, needs, methods, options, default_keys(student.spec.detector))
        source = source.with_store(reader, stored_definition(reader), index_aligned=aligned)
        if aligned:
            recheck_regions(source, reader, positions, views)
        return BoundTeacher(
            forward=partial(reader.schema.decode_batch, needs=needs), methods=built, source=source, ap=side.ap,
            sha256=side.sha256, store_hash=store_digest(reader.storage), store_bytes=reader.bytes_on_disk(),
        )  # fmt: skip
    assert side.detector is not None
    assert side.meta is not None
    if aligned and (side.detector.grid, side.detector.assigner) != (student.grid, student.assigner):
        raise OptionError(
            f"teacher {side.name} and student {student.spec.name} differ in anchors or assigner, and "
            f"{', '.join(methods)} read(s) by anchor index; use a teacher of the same detector"
        )
    order = teachers.class_order(side.meta.classes, source.dataset.classes)
    detector = side.detector.to(device).to(memory_format=torch.channels_last)
    forward = teachers.TeacherForward(detector.eval(), order, options.micro_batch, options.teacher_precision)
    schema = StoreSchema(
        grid=student.grid, canvas=source.canvas, rows=1, shard_rows=1,
        tensors=plan_tensors(needs, side.specs, "lossless"),
    )  # fmt: skip
    return BoundTeacher(
        forward=teachers.live(forward, needs, schema), methods=built, source=source, ap=side.ap, sha256=side.sha256
    )


def stored_definition(reader: StoreReader) -> str:
    """What the guard of a store's rows was made with: for features alone, the student's own anchors may differ."""
    manifest = reader.manifest
    return region_definition(reader.schema.canvas, reader.schema.grid, manifest.assigner_spec, manifest.region_spec)


def _reader_for(
    whole: StoreReader, needs: tuple[Need, ...], methods: Mapping[str, type[Method]], options: TrainOptions,
    keys: tuple[str, str],
) -> StoreReader:  # fmt: skip
    """The reader of what ``needs`` name. Raises StoreError with the command that adds what is missing."""
    try:
        return StoreReader(whole.storage, needs)
    except StoreError as error:
        flags = [f"--method {options.method}"]
        stored = whole.manifest.method_options
        for name, defaults in resolve_all(methods, keys, {}).items():
            plain = {**defaults, **stored.get(name, {})}
            given = options.methods.get(name, {})
            changed = {o: v for o, v in given.items() if o in plain and plain[o] != v}
            flags += [f"--set {name}.{o}={'none' if v is None else str(v).lower()}" for o, v in changed.items()]
        raise StoreError(f"{error}; add them: kdcli cache add {whole.storage} {' '.join(flags)}") from error
