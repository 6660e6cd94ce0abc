"""``kdcli convert``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.cli import flags as f
from kdcli.cli.app import app
from kdcli.errors import OptionError, UsageError, did_you_mean

if TYPE_CHECKING:
    from kdcli.classes import ClassList
    from kdcli.detectors.base import Detector

SOURCES = ("mmdet", "torchvision")
STRIP = (
    "a checkpoint of training holds more than weights: strip it with mmdet's tools/model_converters/publish_model.py"
)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="File of the other library.", show_default=False)],
    source: Annotated[str, typer.Option("--from", help="mmdet or torchvision.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="torchvision's name of the model; mmdet: what to expect.")] = None,
    classes: Annotated[str | None, typer.Option(help="coco: the 80 classes of COCO.")] = None,
    data: Annotated[str | None, typer.Option(help="Data set folder that the model was trained on.")] = None,
    canvas: Annotated[str, typer.Option(help="Image size: 320, or HEIGHTxWIDTH.")] = "800x1344",
    style: Annotated[str | None, typer.Option(help="mmdet only: pytorch, caffe or detectron (images, stride).")] = None,
    prefix: Annotated[str | None, typer.Option(help="mmdet only: of the wanted weights, e.g. teacher_model.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="mmdet only: model.fcos=plain|normalised.")] = None,
    json: f.Json = False,
) -> int:  # fmt: skip
    """Make a checkpoint of a detector that mmdet or torchvision trained. Downloads nothing, runs no code of the file.

    mmdet: GFL, ATSS, FCOS, RetinaNet, Faster R-CNN on ResNet-18 to 152 and ResNeXt-101 64x4d, all with an FPN.
    torchvision: a state dict of retinanet_resnet50_fpn (v1, v2), fcos_resnet50_fpn or fasterrcnn_resnet50_fpn (v1, v2).

    Example: kdcli convert gfl_r101.pth --from mmdet --classes coco --out teacher.pt
    """
    from kdcli.cli.progress import print_json
    from kdcli.detectors.base import count_parameters
    from kdcli.detectors.convert.classes import class_list
    from kdcli.detectors.weights import export
    from kdcli.files import atomic_save
    from kdcli.report.console import human_console, say
    from kdcli.structures import Canvas

    if source not in SOURCES:
        raise OptionError(f"--from '{source}': unknown{did_you_mean(source, SOURCES)}")
    if out.exists():
        raise OptionError(f"'{out}' exists; choose another --out, or delete it")
    size = str(Canvas.parse(canvas))
    given, flag = _given_classes(classes, data)
    content = _load(file, source)
    if source == "mmdet":
        detector, names, found = _mmdet(content, file, model, style, prefix, set_ or [])
    else:
        if style or prefix is not None or set_:
            raise OptionError("--style, --prefix and --set belong to --from mmdet; leave them out")
        detector, names, found = _torchvision(content, file, model)
    listed = class_list(detector.spec.num_classes, names, given, flag)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = export(detector, listed, size, {"converted_from": source, "file": file.name})
    atomic_save(checkpoint, out)
    report: dict[str, Any] = {
        "checkpoint": str(out), "model": detector.spec.name, "classes": len(listed),
        "parameters": count_parameters(detector), "canvas": size, **found,
        "weights_sha256": checkpoint["weights_sha256"],
    }  # fmt: skip
    if json:
        print_json({**report, "spec": detector.spec.to_json()})
    else:
        lines = [
            f"{out}: {detector.spec.name}, {len(listed)} classes, {report['parameters']:,} parameters, canvas {size}"
        ]
        lines += [f"{key.replace('_', ' ')}: {value}" for key, value in found.items()]
        say(human_console(), *lines)
    return 0


def _load(file: Path, source: str) -> Any:
    from kdcli.errors import MissingPathError
    from kdcli.files import load_torch

    if not file.is_file():
        raise MissingPathError(f"{source} file '{file}': no such file")
    try:
        return load_torch(file, what=f"{source} file")
    except OptionError as error:
        raise OptionError(
            f"{error}; {STRIP}" if source == "mmdet" else f"{error}; save its state dict alone"
        ) from error


def _given_classes(classes: str | None, data: str | None) -> tuple[ClassList | None, str]:
    """The classes that the user names, and the flag that says so."""
    from kdcli.data.coco import has_split, open_split
    from kdcli.detectors.convert.coco import COCO_CLASSES

    if classes is not None and data is not None:
        raise UsageError("--classes and --data both name the classes: give one")
    if classes is not None:
        if classes != "coco":
            raise OptionError(f"--classes '{classes}': only coco is known by name; give a data set with --data instead")
        return COCO_CLASSES, "--classes coco"
    if data is not None:
        dataset = open_split(Path(data), "train" if has_split(Path(data), "train") else "val")
        return dataset.classes, f"--data {data}"
    return None, ""


def _mmdet(
    content: Any, file: Path, model: str | None, style: str | None, prefix: str | None, assignments: list[str]
) -> tuple[Detector, list[str] | None, dict[str, Any]]:
    from kdcli.detectors.base import FcosVariant
    from kdcli.detectors.convert.from_mmdet import convert_mmdet
    from kdcli.options import convert as read_option
    from kdcli.options import parse_assignments

    tables = parse_assignments(assignments)
    for table, values in tables.items():
        for key in values:
            if (table, key) != ("model", "fcos"):
                raise OptionError(f"--set {table}.{key}: not of convert, which takes model.fcos alone")
    fcos = tables.get("model", {}).get("fcos")
    chosen = None if fcos is None else read_option("model.fcos", fcos, FcosVariant)
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
    from torch import Tensor

    from kdcli.detectors.convert.coco import COCO_CLASSES, COCO_OUTPUTS
    from kdcli.detectors.convert.from_torchvision import SOURCES as MODELS
    from kdcli.detectors.convert.from_torchvision import class_outputs, convert_torchvision

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
