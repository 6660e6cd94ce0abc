"""From options to the parts of a run: data, student, methods and teacher, checked against each other before step one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdcli.data.check_splits import shared_pictures
from kdcli.data.coco import Dataset, open_split
from kdcli.data.reading import Reading
from kdcli.data.views import format_views, parse_views
from kdcli.detectors.base import Detector, ModelSpec
from kdcli.detectors.build import build_detector, default_keys, default_lr, family_of, parse_model_name
from kdcli.detectors.weights import load_detector
from kdcli.engine.loading.samples import SampleSource
from kdcli.engine.loading.selection import require_boxes_on, usable, with_boxes
from kdcli.engine.runtime.device import make_deterministic, pick_amp, pick_device
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.engine.runtime.threads import pick_workers, set_threads
from kdcli.engine.teacher.binding import BoundTeacher, bind_teacher, inherit_regions, open_teacher, written_otherwise
from kdcli.engine.training.old_runs import to_today
from kdcli.engine.training.run_config import absolute_path, absolute_weights
from kdcli.errors import DataError, OptionError, UsageError
from kdcli.methods.base import Method
from kdcli.methods.resolve import absolute_methods, find_methods, resolve_all
from kdcli.options import TrainOptions
from kdcli.store.storage.resolve import absolute
from kdcli.structures import Canvas
from kdcli.tensors import world_size


@dataclass(frozen=True, kw_only=True)
class RunSetup:
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
    teacher: BoundTeacher | None  # None in plain training


def prepare(options: TrainOptions, given: frozenset[str], reporter: ProgressReporter) -> RunSetup:
    """Open everything that ``options`` name. ``given``: the fields that the user set rather than left to default.

    Raises DataError, OptionError, MissingPathError or StoreError, before anything is written.
    """
    if options.deterministic:
        make_deterministic()
    if options.batch < world_size():
        raise OptionError(f"--batch {options.batch} is over all {world_size()} processes: each needs an image")
    threads = set_threads(options.threads)
    device = pick_device(options.device)
    amp = pick_amp(options.amp, device)
    train, val = open_split(Path(options.data), "train"), open_split(Path(options.data), "val")
    if train.classes.names != val.classes.names:
        raise DataError(f"the train and val annotations under '{options.data}' do not have the same categories")
    methods = find_methods(options.method) if options.command == "distill" else {}
    side = open_teacher(options, train) if methods else None
    canvas = side.canvas if side and "canvas" not in given else Canvas.parse(options.canvas)
    views = side.views if side and side.views and "views" not in given else parse_views(options.views)

    reader = side.reader if side else None
    record = reader.manifest.dataset if reader else None
    if record is not None and record.boxes is not None:
        options = replace(options, clip_boxes=True)
    reading = Reading(options.exif, options.clip_boxes)
    image_store = reader if reader and reader.schema.images else None
    as_written = record is not None and record.exif is not None and options.exif == "auto"
    trained = usable(
        train, options.skip_bad, reporter, image_store, trains=True,
        reading=replace(reading, exif="ignore") if as_written else reading,
    )  # fmt: skip
    train, positions = trained.dataset, trained.positions
    require_boxes_on(train, positions, canvas, reporter)
    if options.skip_empty:
        positions = with_boxes(train, positions, reporter)
    reading = replace(reading, like_ignored=not train.exif)
    scored = usable(val, options.skip_bad, reporter, reading=reading, trains=False)
    for shared in shared_pictures(trained.report, scored.report):
        reporter.message(f"warning: {shared}")
    torch.manual_seed(options.seed)
    student = make_student(options, len(train.classes))
    options = to_today(options, student, reporter)
    resolved = resolve_all(methods, default_keys(student.spec.detector), options.methods, student.region_defaults)
    if reader:
        resolved = inherit_regions(resolved, methods, reader, options.methods)
        for line in written_otherwise(resolved, methods, reader, options.methods):
            reporter.message(line)
    view_seed = reader.manifest.view_seed if reader else 0
    source = SampleSource.for_training(train, canvas, student, view_seed=view_seed)
    options = replace(
        options,
        canvas=str(canvas), views=format_views(views), methods=resolved, threads=threads,
        data=str(Path(options.data).resolve()),
        model=replace(options.model, bn=student.spec.bn, head_channels=student.spec.head_channels),
        optim=replace(
            options.optim, lr=default_lr(student.spec.detector) if options.optim.lr is None else options.optim.lr
        ),
        cache=None if options.cache is None else absolute(options.cache),
        teacher=absolute_path(options.teacher), init_from=absolute_path(options.init_from),
        backbone_weights=absolute_weights(options.backbone_weights), method=absolute_methods(options.method),
    )  # fmt: skip
    for name, method in methods.items():
        if warning := method.warning(family_of(student.spec.detector), resolved[name], len(train.classes)):
            reporter.message(f"{name}: {warning}")
    bound = bind_teacher(side, student, methods, options, source, positions, views, device) if side else None
    return RunSetup(
        options=options, train=train, val=scored.dataset, positions=positions, val_left_out=scored.left_out, canvas=canvas,
        views=views, device=device, amp=amp, workers=pick_workers(options.workers), student=student,
        methods=bound.methods if bound else {}, source=bound.source if bound else source, teacher=bound,
    )  # fmt: skip


def make_student(options: TrainOptions, num_classes: int) -> Detector:
    """The detector of ``[model]``, from scratch, on a pretrained backbone or from a checkpoint."""
    if not options.model.name:
        raise UsageError("--model is missing: name one such as gfl_resnet18; `kdcli models` lists them")
    detector, backbone = parse_model_name(options.model.name)
    names = ("fpn_channels", "tower_convs", "head_channels", "reg_max", "bn", "box", "box_loss", "fcos", "dcn")
    table = {k: getattr(options.model, k) for k in names}
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
