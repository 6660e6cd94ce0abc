"""From a file of mmdet or torchvision to a checkpoint of ours: loads it, converts it, names its classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kdcli.classes import ClassList
from kdcli.detectors.base import Detector, FcosVariant, count_parameters
from kdcli.detectors.convert.classes import class_list
from kdcli.detectors.convert.coco import COCO_CLASSES, COCO_OUTPUTS
from kdcli.detectors.convert.from_mmdet import convert_mmdet
from kdcli.detectors.convert.from_torchvision import SOURCES as MODELS
from kdcli.detectors.convert.from_torchvision import class_outputs, convert_torchvision
from kdcli.detectors.weights import export
from kdcli.errors import MissingPathError, OptionError, UsageError
from kdcli.files import load_torch
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
    ]  # what the file said of itself: ``style``, ``fcos``, ``left_out``; each only where there is one

    @property
    def parameters(self) -> int:
        """Of the detector, frozen ones too."""
        return count_parameters(self.detector)


def convert_file(
    file: Path, source: str, canvas: str, *, classes: ClassList | None = None, classes_from: str = "",
    model: str | None = None, style: str | None = None, prefix: str | None = None, assignments: list[str] | None = None,
) -> ConvertedFile:  # fmt: skip
    """Read ``file`` of ``source`` (``mmdet`` or ``torchvision``); runs no code of it and downloads nothing.

    ``classes``: of the data set that the model was trained on, None for those that the file names or that its outputs
    imply; ``classes_from``: how the user named them, for messages. ``model``: torchvision's name of the model, or what to
    expect of mmdet's. ``style``, ``prefix`` and ``assignments`` (``model.fcos=...``) are for mmdet alone. Raises
    MissingPathError, UsageError for a missing model, OptionError for what cannot be converted or does not go together.
    """
    content = _load(file, source)
    if source == "mmdet":
        detector, names, found = _mmdet(content, file, model, style, prefix, assignments or [])
    else:
        if style or prefix is not None or assignments:
            raise OptionError("--style, --prefix and --set belong to --from mmdet; leave them out")
        detector, names, found = _torchvision(content, file, model)
    listed = class_list(detector.spec.num_classes, names, classes, classes_from)
    checkpoint = export(detector, listed, canvas, {"converted_from": source, "file": file.name})
    return ConvertedFile(checkpoint=checkpoint, detector=detector, classes=listed, found=found)


def _load(file: Path, source: str) -> Any:
    if not file.is_file():
        raise MissingPathError(f"{source} file '{file}': no such file")
    try:
        return load_torch(file, what=f"{source} file")
    except OptionError as error:
        raise OptionError(
            f"{error}; {STRIP}" if source == "mmdet" else f"{error}; save its state dict alone"
        ) from error


def _mmdet(
    content: Any, file: Path, model: str | None, style: str | None, prefix: str | None, assignments: list[str]
) -> tuple[Detector, list[str] | None, dict[str, Any]]:
    tables = parse_assignments(assignments)
    for table, values in tables.items():
        for key in values:
            if (table, key) != ("model", "fcos"):
                raise OptionError(f"--set {table}.{key}: not of convert, which takes model.fcos alone")
    fcos = tables.get("model", {}).get("fcos")
    chosen = None if fcos is None else convert("model.fcos", fcos, FcosVariant)
    try:
        made = convert_mmdet(content, prefix=prefix, style=style, fcos=chosen)
    except OptionError as error:
        raise OptionError(f"{file}: {error}") from error
    if model is not None and model != made.detector.spec.name:
        raise OptionError(f"{file}: holds {made.detector.spec.name}, not {model}; correct --model or leave it out")
    found: dict[str, Any] = {"style": f"{made.style} ({made.style_source})"}
    if made.detector.spec.detector == "fcos":
        found["fcos"] = made.detector.spec.fcos
    if made.left_out:
        found["left_out"] = ", ".join(made.left_out)
    return made.detector, made.names, found


def _torchvision(content: Any, file: Path, model: str | None) -> tuple[Detector, list[str] | None, dict[str, Any]]:
    if model is None:
        raise UsageError(f"--model is missing: name torchvision's model, one of {', '.join(MODELS)}")
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise OptionError(f"{file}: not a state dict; save torchvision's model.state_dict() alone")
    try:
        detector, outputs = convert_torchvision(content, model), class_outputs(content, model)
    except OptionError as error:
        raise OptionError(f"{file}: {error}") from error
    names = COCO_CLASSES.names if outputs == COCO_OUTPUTS else None
    return detector, names, {}
