"""``kdcli convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcli.cli import flags as f
from kdcli.cli.app import app
from kdcli.errors import OptionError, UsageError, did_you_mean

if TYPE_CHECKING:
    from kdcli.classes import ClassList

SOURCES = ("mmdet", "torchvision")


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
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="mmdet only: model.fcos=plain|normalised, model.neck.")
    ] = None,
    features_only: Annotated[
        bool, typer.Option("--features-only", help="mmdet only: backbone and FPN of any detector, for cwd, pkd, fgd, drkd.")
    ] = False,
    json: f.Json = False,
) -> int:  # fmt: skip
    """Make a checkpoint of a detector that mmdet or torchvision trained. Downloads nothing, runs no code of the file.

    mmdet: GFL, ATSS, FCOS, RetinaNet, Faster R-CNN on ResNet-18 to 152 and ResNeXt-101 32x4d, 64x4d, all with an FPN.
    With --features-only any other one with such a backbone and an FPN: a teacher for methods that read feature maps.
    torchvision: a state dict of retinanet_resnet50_fpn (v1, v2), fcos_resnet50_fpn or fasterrcnn_resnet50_fpn (v1, v2).

    Example: kdcli convert gfl_r101.pth --from mmdet --classes coco --out teacher.pt
    """
    from kdcli.cli.json_output import print_json
    from kdcli.detectors.convert.file import convert_file
    from kdcli.files import atomic_save
    from kdcli.report.console import human_console, say
    from kdcli.structures import Canvas

    if source not in SOURCES:
        raise OptionError(f"--from '{source}': unknown{did_you_mean(source, SOURCES)}")
    if out.exists():
        raise OptionError(f"'{out}' exists; choose another --out, or delete it")
    size = str(Canvas.parse(canvas))
    given, flag = _given_classes(classes, data)
    made = convert_file(
        file, source, size, classes=given, classes_from=flag, model=model, style=style, prefix=prefix, assignments=set_,
        features_only=features_only,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_save(made.checkpoint, out)
    spec = made.detector.spec
    if json:
        print_json({
            "checkpoint": str(out), "model": spec.name, "classes": len(made.classes), "parameters": made.parameters,
            "canvas": size, **made.found, "weights_sha256": made.checkpoint["weights_sha256"], "spec": spec.to_json(),
        })  # fmt: skip
    else:
        lines = [
            f"{out}: {spec.name}, {len(made.classes)} classes, {made.parameters:,} parameters, canvas {size}",
            *(f"{key.replace('_', ' ')}: {value}" for key, value in made.found.items()),
        ]
        say(human_console(), *lines)
    return 0


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
