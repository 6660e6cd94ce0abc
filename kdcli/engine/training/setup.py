"""From options to the parts of a run: data, student, methods and teacher, checked against each other before step one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdcli.data.check import check_dataset
from kdcli.data.coco import Dataset, open_split
from kdcli.data.views import format_views, parse_views
from kdcli.detectors.base import Detector, ModelSpec
from kdcli.detectors.build import build_detector, family_of, lineage_of, parse_model_name
from kdcli.detectors.weights import load_detector
from kdcli.engine.loading.samples import SampleSource
from kdcli.engine.runtime.device import make_deterministic, pick_amp, pick_device, pick_workers, set_threads
from kdcli.engine.runtime.progress import Watcher
from kdcli.engine.teacher.binding import JoinedTeacher, inherit_regions, join_teacher, open_teacher
from kdcli.errors import DataError, OptionError, UsageError, counted
from kdcli.methods import find_methods
from kdcli.methods.base import Method, resolve_options
from kdcli.options import TrainOptions
from kdcli.store.reader import CacheReader
from kdcli.store.storage.local import absolute
from kdcli.structures import Canvas
from kdcli.tensors import world_size

BACKBONE_WORDS = ("none", "imagenet")
DECODED_IMAGES = 1000  # seconds; all of COCO would take minutes at each start


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
    teacher: JoinedTeacher | None  # None in plain training


def prepare(options: TrainOptions, given: frozenset[str], watcher: Watcher) -> Prepared:
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
    if [c.name for c in train.classes] != [c.name for c in val.classes]:
        raise DataError(f"the train and val annotations under '{options.data}' do not have the same categories")
    methods = find_methods(options.method) if options.command == "distill" else {}
    side = open_teacher(options, train) if methods else None
    canvas = side.canvas if side and "canvas" not in given else Canvas.parse(options.canvas)
    views = side.views if side and side.views and "views" not in given else parse_views(options.views)

    pictured = side.reader if side and side.reader and side.reader.schema.images else None
    positions = usable(train, options.skip_bad, watcher, pictured)
    if options.skip_empty:
        positions = with_boxes(train, positions, watcher)
    val_bad = frozenset(range(val.num_images)) - frozenset(usable(val, options.skip_bad, watcher).tolist())
    torch.manual_seed(options.seed)
    student = make_student(options, len(train.classes))
    resolved = {
        name: resolve_options(
            name, method, lineage_of(student.spec.detector), options.methods.get(name, {}), student.region_defaults
        )
        for name, method in methods.items()
    }
    if side and side.reader:
        resolved = inherit_regions(resolved, methods, side.reader, options.methods)
    view_seed = side.reader.manifest["view_seed"] if side and side.reader else 0
    source = SampleSource(train, canvas, view_seed, student.grid, student.assigner, student.region_defaults)
    options = replace(
        options,
        canvas=str(canvas), views=format_views(views), methods=resolved, threads=threads,
        data=str(Path(options.data).resolve()),
        model=replace(options.model, bn=student.spec.bn, head_channels=student.spec.head_channels),
        cache=None if options.cache is None else absolute(options.cache),
        teacher=_absolute(options.teacher), init_from=_absolute(options.init_from),
        backbone_weights=absolute_weights(options.backbone_weights), method=absolute_methods(options.method),
    )  # fmt: skip
    for name, method in methods.items():
        if caution := method.caution(family_of(student.spec.detector), resolved[name], len(train.classes)):
            watcher.note(f"{name}: {caution}")
    joined = join_teacher(side, student, methods, options, source, positions, views, device) if side else None
    return Prepared(
        options, train, val, positions, val_bad, canvas, views, device, amp, pick_workers(options.workers), student,
        joined.methods if joined else {}, joined.source if joined else source, joined,
    )  # fmt: skip


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
    names = ("fpn_channels", "tower_convs", "head_channels", "reg_max", "bn", "box", "fcos")
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


def usable(
    dataset: Dataset, skip_bad: bool, watcher: Watcher, pictured: CacheReader | None = None
) -> NDArray[np.int64]:
    """Positions of the images that may be used. Raises DataError on a fault unless ``skip_bad``, which lists them.

    Images are decoded whole when the set is small or when bad ones are to be left out; else their headers are read, and
    an image that cannot be decoded stops the run when its turn comes. With ``pictured``, a store that has the pixels, no
    file is opened: the bad ones are those that the store was written without.
    """
    decode = skip_bad or dataset.num_images <= DECODED_IMAGES
    report = check_dataset(dataset, decode=decode, files=pictured is None)
    report.refuse(skip_bad)
    for fault in report.faults:
        watcher.note(f"left out: {fault.where}: {fault.message}")
    bad = set(report.bad_images)
    if pictured is not None and skip_bad:
        gone = set(pictured.manifest["dataset"]["left_out"])
        lost = {i for i in range(dataset.num_images) if dataset.image_id(i) in gone} - bad
        if lost:
            watcher.note(f"left out: {counted(len(lost), 'image')} that store '{pictured.place}' was written without")
        bad |= lost
    keep = np.array([i for i in range(dataset.num_images) if i not in bad], dtype=np.int64)
    return keep


def with_boxes(dataset: Dataset, positions: NDArray[np.int64], watcher: Watcher) -> NDArray[np.int64]:
    """Those of ``positions`` whose image has a box to train on: no crowd, no side below a pixel of the image.

    Raises DataError when none is left.
    """
    keep = np.array([len(dataset.training_boxes(int(p))[0]) > 0 for p in positions], dtype=bool)
    if not keep.any():
        raise DataError(
            f"{dataset.annotations_path}: no image has a box to train on; correct it, or leave skip_empty out"
        )
    if not keep.all():
        watcher.note(f"left out: {int((~keep).sum())} of {len(keep)} images, which have no box to train on")
    kept: NDArray[np.int64] = positions[keep]
    return kept
