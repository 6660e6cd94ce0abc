"""From a file of mmdet or torchvision to a checkpoint of ours: loads it, converts it, names its classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcli.classes import ClassList
from kdcli.detectors.base import Detector, FcosVariant, FeatureNeck, count_parameters
from kdcli.detectors.convert.classes import class_list
from kdcli.detectors.convert.coco import COCO_CLASSES, COCO_OUTPUTS
from kdcli.detectors.convert.from_mmdet import convert_mmdet
from kdcli.detectors.convert.from_mmdet_features import convert_mmdet_features
from kdcli.detectors.convert.from_torchvision import SOURCES as MODELS
from kdcli.detectors.convert.from_torchvision import class_outputs, convert_torchvision
from kdcli.detectors.convert.mmdet_names import some
from kdcli.detectors.soundness import require_sound, zero_kernels
from kdcli.detectors.state_dicts import unwrapped, weights_in
from kdcli.detectors.weights import export
from kdcli.errors import MissingPathError, OptionError, UsageError
from kdcli.files import ForeignObjectsError, load_torch
from kdcli.options import convert, parse_assignments

STRIP = (
    "a checkpoint of training holds more than weights: strip it with mmdet's tools/model_converters/publish_model.py"
)


@dataclass(frozen=True, kw_only=True)
class ConvertedFile:
    """A detector of another library, ready to be written by ``files.atomic_save``."""

    checkpoint: dict[str, Any]
    detector: Detector
    classes: ClassList
    found: dict[
        str, Any
    ]  # what the file said: ``style``, ``fcos``, ``neck``, ``left_out``, ``all_zero``; each where there is one

    @property
    def parameters(self) -> int:
        """Of the detector, frozen ones too."""
        return count_parameters(self.detector)


def convert_file(
    file: Path, source: str, canvas: str, *, classes: ClassList | None = None, classes_from: str = "",
    model: str | None = None, style: str | None = None, prefix: str | None = None, assignments: list[str] | None = None,
    features_only: bool = False,
) -> ConvertedFile:  # fmt: skip
    """Read ``file`` of ``source`` (``mmdet`` or ``torchvision``); runs no code of it and downloads nothing.

    ``classes``: of the data set that the model was trained on, None for those that the file names or that its outputs
    imply; ``classes_from``: how the user named them, for messages. ``model``: torchvision's name of the model, or what to
    expect of mmdet's. ``style``, ``prefix``, ``assignments`` (``model.fcos=...``, ``model.neck=...``) and
    ``features_only``, backbone and neck alone, are for mmdet. Raises MissingPathError, UsageError for a missing model,
    OptionError for what cannot be converted or does not go together.
    """
    content = _load(file, source)
    if source == "mmdet":
        tables = _model_options(assignments or [], "neck" if features_only else "fcos")
        try:
            if features_only:
                count = None if classes is None else len(classes)
                detector, names, found = _mmdet_features(content, count, style, prefix, tables.get("neck"))
            else:
                detector, names, found = _mmdet(content, style, prefix, tables.get("fcos"))
        except OptionError as error:
            raise OptionError(f"{file}: {error}") from error
        if model is not None and model != detector.spec.name:
            raise OptionError(f"{file}: holds {detector.spec.name}, not {model}; correct --model or leave it out")
    else:
        if style or prefix is not None or assignments or features_only:
            raise OptionError("--style, --prefix, --set and --features-only belong to --from mmdet; leave them out")
        detector, names, found = _torchvision(content, file, model)
    if zeros := zero_kernels(detector.state_dict()):
        found["all_zero"] = some(zeros)
    listed = class_list(detector.spec.num_classes, names, classes, classes_from)
    checkpoint = export(detector, listed, canvas, {"converted_from": source, "file": file.name})
    return ConvertedFile(checkpoint=checkpoint, detector=detector, classes=listed, found=found)


def _load(file: Path, source: str) -> Any:
    if not file.is_file():
        raise MissingPathError(f"{source} file '{file}': no such file")
    try:
        return load_torch(file, what=f"{source} file", foreign=True)
    except ForeignObjectsError as error:
        raise OptionError(
            f"{error}; {STRIP}" if source == "mmdet" else f"{error}; save its state dict alone"
        ) from error


def _model_options(assignments: list[str], option: str) -> dict[str, Any]:
    """The table ``model`` of ``--set``, which may have ``option`` alone. Raises OptionError for another one."""
    tables = parse_assignments(assignments)
    for table, values in tables.items():
        for key in values:
            if (table, key) != ("model", option):
                other = "convert --features-only" if option == "neck" else "convert"
                raise OptionError(f"--set {table}.{key}: not of {other}, which takes model.{option} alone")
    return dict(tables.get("model", {}))


def _mmdet(
    content: Any, style: str | None, prefix: str | None, fcos: Any
) -> tuple[Detector, list[str] | None, dict[str, Any]]:
    chosen = None if fcos is None else convert("model.fcos", fcos, FcosVariant)
    made = convert_mmdet(content, prefix=prefix, style=style, fcos=chosen)
    found: dict[str, Any] = {"style": f"{made.style} ({made.style_source})"}
    if made.detector.spec.detector == "fcos":
        found["fcos"] = made.detector.spec.fcos
    if made.left_out:
        found["left_out"] = ", ".join(made.left_out)
    return made.detector, made.names, found


def _mmdet_features(
    content: Any, classes: int | None, style: str | None, prefix: str | None, neck: Any
) -> tuple[Detector, list[str] | None, dict[str, Any]]:
    chosen = None if neck is None else convert("model.neck", neck, FeatureNeck)
    made = convert_mmdet_features(content, classes=classes, prefix=prefix, style=style, neck=chosen)
    found = {"style": f"{made.style} ({made.style_source})", "neck": made.neck}
    if made.left_out:
        found["left_out"] = ", ".join(made.left_out)
    return made.detector, made.names, found


def _torchvision(content: Any, file: Path, model: str | None) -> tuple[Detector, list[str] | None, dict[str, Any]]:
    if model is None:
        raise UsageError(f"--model is missing: name torchvision's model, one of {', '.join(MODELS)}")
    if isinstance(content, Mapping) and {"state_dict", "meta"} <= content.keys():
        raise OptionError(
            f"{file}: not a state dict; save torchvision's model.state_dict() alone (mmdet: --from mmdet)"
        )
    try:
        weights, beside = weights_in(content)
    except OptionError as error:
        raise OptionError(f"{file}: not a state dict; save torchvision's model.state_dict() alone ({error})") from error
    state = unwrapped(weights)
    require_sound(state, str(file))
    try:
        detector, outputs = convert_torchvision(state, model), class_outputs(state, model)
    except OptionError as error:
        raise OptionError(f"{file}: {error}") from error
    names = COCO_CLASSES.names if outputs == COCO_OUTPUTS else None
    return detector, names, {"left_out": ", ".join(beside)} if beside else {}
