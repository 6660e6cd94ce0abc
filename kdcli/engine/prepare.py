"""From options to the parts of a run: data, student, methods and teacher, checked against each other before step one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcli.cache.reader import CacheReader
from kdcli.cache.schema import CacheSchema, plan_tensors, regions_of
from kdcli.cache.writer import store_digest
from kdcli.data.check import check_dataset
from kdcli.data.coco import Dataset, open_split
from kdcli.data.views import format_views, parse_views, to_canvas
from kdcli.detectors.base import Detector, ModelSpec
from kdcli.detectors.build import build_detector, parse_model_name
from kdcli.detectors.weights import load_detector
from kdcli.engine import teacher as teachers
from kdcli.engine.devices import make_deterministic, pick_amp, pick_device, pick_workers, set_threads
from kdcli.engine.manifest import cache_command, region_spec, require_match, specs_of, with_classes
from kdcli.engine.samples import SampleSource
from kdcli.engine.watch import Watcher
from kdcli.errors import DataError, OptionError, StoreError, UsageError
from kdcli.geometry.assign import assign
from kdcli.geometry.regions import compute_entries
from kdcli.methods import find_methods
from kdcli.methods.base import Method, Pair, check_pair, resolve_options
from kdcli.options import TrainOptions
from kdcli.structures import Canvas, RowKey
from kdcli.tensors import Need, TensorSpec

BACKBONE_WORDS = ("none", "imagenet")
RECHECKED_ROWS = 64
RECHECK_TOLERANCE = 1e-3  # of a row's anchors: float64 on another CPU may move a tie


@dataclass(frozen=True)
class Prepared:
    """A run, ready for its first step."""

    options: TrainOptions  # resolved: what config.toml holds
    train: Dataset
    val: Dataset
    positions: NDArray[np.int64]  # images of train that are used
    val_left_out: frozenset[int]
    canvas: Canvas
    views: tuple[str, ...]
    device: torch.device
    amp: torch.dtype | None
    workers: int
    student: Detector
    methods: dict[str, Method]
    source: SampleSource
    teacher: teachers.Teacher | None
    teacher_ap: float | None = None
    teacher_sha256: str | None = None
    store_hash: str | None = None
    store_bytes: int | None = None


@dataclass(frozen=True)
class _TeacherSide:
    """What the teacher, live or stored, contributes before the student is known."""

    name: str
    specs: Mapping[str, TensorSpec]
    canvas: Canvas
    views: tuple[str, ...] | None
    reader: CacheReader | None
    detector: Detector | None
    ap: float | None
    sha256: str


def prepare(options: TrainOptions, given: frozenset[str], watcher: Watcher) -> Prepared:
    """Open everything that ``options`` name. ``given``: the fields that the user set rather than left to default.

    Raises DataError, OptionError, MissingPathError or StoreError, before anything is written.
    """
    if options.deterministic:
        make_deterministic()
    threads = set_threads(options.threads)
    device = pick_device(options.device)
    amp = pick_amp(options.amp, device)
    train, val = open_split(Path(options.data), "train"), open_split(Path(options.data), "val")
    if [c.name for c in train.classes] != [c.name for c in val.classes]:
        raise DataError(f"the train and val annotations under '{options.data}' do not have the same categories")
    methods = find_methods(options.method) if options.command == "distill" else {}
    side = _open_teacher(options, given, train) if methods else None
    canvas = side.canvas if side and "canvas" not in given else Canvas.parse(options.canvas)
    views = side.views if side and side.views and "views" not in given else parse_views(options.views)

    positions = usable(train, options.skip_bad, watcher)
    val_bad = frozenset(range(val.num_images)) - frozenset(usable(val, options.skip_bad, watcher).tolist())
    torch.manual_seed(options.seed)
    student = make_student(options, len(train.classes))
    resolved = {
        name: resolve_options(name, method, student.spec.detector, options.methods.get(name, {}))
        for name, method in methods.items()
    }
    if side:
        resolved = _inherit_regions(resolved, methods, side, options)
    view_seed = side.reader.manifest["view_seed"] if side and side.reader else 0
    source = SampleSource(train, canvas, view_seed, student.grid, student.assigner, student.region_defaults)
    options = replace(
        options,
        canvas=str(canvas), views=format_views(views), methods=resolved, threads=threads,
        data=str(Path(options.data).resolve()),
        model=replace(options.model, bn=student.spec.bn, head_channels=student.spec.head_channels),
        cache=_absolute(options.cache), teacher=_absolute(options.teacher), init_from=_absolute(options.init_from),
        backbone_weights=absolute_weights(options.backbone_weights), method=absolute_methods(options.method),
    )  # fmt: skip
    base = Prepared(
        options, train, val, positions, val_bad, canvas, views, device, amp, pick_workers(options.workers), student, {},
        source, None,
    )  # fmt: skip
    return _with_teacher(base, methods, side) if side else base


def absolute_weights(weights: str) -> str:
    """``--backbone-weights`` with a path made absolute."""
    return weights if weights in BACKBONE_WORDS else str(Path(weights).resolve())


def absolute_methods(text: str) -> str:
    """``--method`` with the paths of a user's files made absolute."""
    parts = [part.strip().rpartition(":") for part in text.split(",")] if text else []
    return ",".join(f"{Path(path).resolve()}:{name}" if colon else name for path, colon, name in parts)


def _absolute(path: str | None) -> str | None:
    """config.toml runs again from any folder."""
    return None if path is None else str(Path(path).resolve())


def make_student(options: TrainOptions, num_classes: int) -> Detector:
    """The detector of ``[model]``, from scratch, on a pretrained backbone or from a checkpoint."""
    if not options.model.name:
        raise UsageError("--model is missing: name one such as gfl_resnet18; `kdcli models` lists them")
    detector, backbone = parse_model_name(options.model.name)
    table = {k: getattr(options.model, k) for k in ("fpn_channels", "tower_convs", "head_channels", "reg_max", "bn")}
    student = build_detector(
        ModelSpec(detector=detector, backbone=backbone, num_classes=num_classes, **table), options.backbone_weights
    )
    if options.init_from:
        other, _ = load_detector(options.init_from)
        if other.spec.to_json() | {"bn": ""} != student.spec.to_json() | {"bn": ""}:
            raise OptionError(
                f"--init-from {options.init_from} holds {other.spec.to_json()}, the run asks for "
                f"{student.spec.to_json()}; give the same model options"
            )
        student.load_state_dict(other.state_dict())
    return student


def usable(dataset: Dataset, skip_bad: bool, watcher: Watcher) -> NDArray[np.int64]:
    """Positions of the images that may be used. Raises DataError on a fault unless ``skip_bad``, which lists them."""
    report = check_dataset(dataset, decode=False)
    report.refuse(skip_bad)
    for fault in report.faults:
        watcher.note(f"left out: {fault.where}: {fault.message}")
    keep = np.array([i for i in range(dataset.num_images) if i not in report.bad_images], dtype=np.int64)
    return keep


def _open_teacher(options: TrainOptions, given: frozenset[str], train: Dataset) -> _TeacherSide:
    if bool(options.cache) == bool(options.teacher):
        raise OptionError("distill takes either --cache STORE or --teacher CKPT (the live teacher), not both or none")
    if options.cache:
        reader = CacheReader(Path(options.cache))
        entry = reader.manifest["teacher"]
        name = f"{entry['model']['detector']}_{entry['model']['backbone']}"
        return _TeacherSide(
            name,
            specs_of(reader.manifest),
            reader.schema.canvas,
            reader.views,
            reader,
            None,
            entry["ap"],
            entry["weights_sha256"],
        )
    assert options.teacher
    detector, meta = load_detector(options.teacher)
    ap = meta.extra.get("ap")
    return _TeacherSide(
        detector.spec.name, with_classes(detector.specs(), len(train.classes)), Canvas.parse(meta.canvas), None, None,
        detector, ap if isinstance(ap, float) else None, meta.weights_sha256,
    )  # fmt: skip


def _inherit_regions(
    resolved: dict[str, dict[str, Any]], methods: Mapping[str, type[Method]], side: _TeacherSide, options: TrainOptions
) -> dict[str, dict[str, Any]]:
    """A store's region options are the run's, unless the user asked for others (which then do not match)."""
    if side.reader is None:
        return resolved
    stored = side.reader.manifest["regions"]
    return {
        name: {
            **values,
            **{o: stored[o] for o in methods[name].region_options if o not in options.methods.get(name, {})},
        }
        for name, values in resolved.items()
    }


def _with_teacher(base: Prepared, methods: Mapping[str, type[Method]], side: _TeacherSide) -> Prepared:
    options, student = base.options, base.student
    specs = student.specs()
    pair = Pair(specs, side.specs, student.grid, base.canvas, student.spec.detector)
    for name, method in methods.items():
        check_pair(name, method, pair, student.spec.name, side.name)
    built = {name: method(pair, **options.methods[name]) for name, method in methods.items()}
    needs: tuple[Need, ...] = tuple(sorted({n for m in built.values() for n in m.needs}))
    spec = region_spec(student, methods, options.methods)
    aligned = any(m.index_aligned for m in methods.values())
    source = replace(base.source, region_spec=spec, regions=regions_of(needs))
    if side.reader is not None:
        index_space = (student.grid, student.assigner, spec) if aligned else None
        require_match(side.reader, base.train, base.canvas, base.views, index_space)
        reader = _reader_for(side.reader, needs, base, side)
        source = replace(source, reader=reader)
        recheck_regions(source, base.positions, base.views)
        return replace(
            base, methods=built, source=source, teacher=teachers.cached(reader.schema, needs), teacher_ap=side.ap,
            teacher_sha256=side.sha256,            store_hash=store_digest(reader.path), store_bytes=reader.bytes_on_disk(),
        )  # fmt: skip
    assert side.detector is not None
    if aligned and (side.detector.grid, side.detector.assigner) != (student.grid, student.assigner):
        raise OptionError(
            f"teacher {side.name} and student {student.spec.name} differ in anchors or assigner, and "
            f"{', '.join(methods)} read(s) by anchor index; use a teacher of the same detector"
        )
    _, meta = load_detector(str(options.teacher))
    order = teachers.class_order([c["name"] for c in meta.classes], [c.name for c in base.train.classes])
    detector = side.detector.to(base.device).to(memory_format=torch.channels_last)
    forward = teachers.TeacherForward(detector.eval(), order, options.micro_batch, options.teacher_precision)
    schema = CacheSchema(student.grid, base.canvas, 1, 1, plan_tensors(needs, side.specs, "lossless"))
    return replace(
        base, methods=built, source=source, teacher=teachers.live(forward, needs, schema), teacher_ap=side.ap,
        teacher_sha256=side.sha256,
    )  # fmt: skip


def _reader_for(whole: CacheReader, needs: tuple[Need, ...], base: Prepared, side: _TeacherSide) -> CacheReader:
    try:
        return CacheReader(whole.path, needs)
    except StoreError as error:
        fix = cache_command(
            base.options.data,
            f"RUN-OF-{side.name}",
            ",".join(dict.fromkeys([*str(whole.manifest["methods"]).split(","), *base.options.method.split(",")])),
            whole.views,
            base.canvas,
            f"{whole.path}-more",
        )
        raise StoreError(f"{error}; write one that has them: {fix}") from error


def recheck_regions(source: SampleSource, positions: NDArray[np.int64], views: tuple[str, ...]) -> int:
    """Compute the entries of up to 64 rows again and compare them with the store's; returns how many rows were compared.

    Raises StoreError when more than 0.1 % of a row's anchors differ.
    """
    reader = source.reader
    if reader is None or not reader.schema.sparse:
        return 0
    step = max(1, len(positions) * len(views) // RECHECKED_ROWS)
    chosen = [(int(p), v) for p in positions for v in views][::step][:RECHECKED_ROWS]
    for item in chosen:
        geometry = source.geometry(item)
        boxes_np, _ = source.dataset.training_boxes(item[0])
        boxes, keep = to_canvas(torch.from_numpy(boxes_np), geometry)
        boxes = boxes[keep]
        assigned = assign(source.assigner, source.grid, geometry.canvas, boxes, geometry.content)
        ours = compute_entries(
            reader.schema.regions, source.region_spec, source.grid, geometry.canvas, boxes, assigned, geometry.content
        )
        key = RowKey(source.dataset.image_id(item[0]), item[1])
        theirs = reader.read(key).entries
        assert theirs is not None
        mine = set(zip(ours.index.tolist(), ours.flag.tolist(), strict=True))
        stored = set(zip(theirs.index.tolist(), theirs.flag.tolist(), strict=True))
        if len(mine ^ stored) > RECHECK_TOLERANCE * source.grid.num_total(geometry.canvas):
            raise StoreError(
                f"store '{reader.path}', {key}: {len(mine ^ stored)} region entries differ from those computed here; the "
                "boxes or the region rules have changed: write the store again"
            )
    return len(chosen)
