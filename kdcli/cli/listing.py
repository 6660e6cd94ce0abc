"""``kdcli methods``, ``kdcli models`` and ``kdcli version``."""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kdcli.cli import flags as f
from kdcli.cli.app import app

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from kdcli.detectors.base import Detector
    from kdcli.methods.base import Method
    from kdcli.structures import Canvas
    from kdcli.tensors import TensorSpec

Size = Annotated[str, typer.Option("--canvas", help="Image size to price, e.g. 640 or 800x1344.")]
Classes = Annotated[int, typer.Option(min=1, help="Classes to price.")]

FACTORS = ("vlr", "cls", "loc")  # options that scale a term and are not called a weight
CAPTION = (
    "Bytes of one image in one view at {canvas} with {classes} classes: 7 boxes (1000 proposals), a neck of 256 channels,\n"
    "default encodings, before compression; backbone stages are those of a ResNet-50. A weight of 0 leaves its term out.\n"
    '"with" names options that make a method read more (+); @all is dense. tv_* and mm_* detectors give the tensors of the\n'
    "detector that they are named after. `kdcli cache-teacher --estimate` prices your own images."
)


@app.command()
def methods(canvas: Size = "800x1344", classes: Classes = 80, json: f.Json = False) -> int:
    """List the distillation methods: on which detectors they work, what they store there, default weights, evidence.

    Bytes are for an image with 7 boxes in one view, with a neck of 256 channels and the default encodings, before
    compression. `cache-teacher --estimate` measures your own images.

    Example: kdcli methods --canvas 640 --classes 20
    """
    from kdcli.cli.progress import print_json
    from kdcli.report.console import human_console
    from kdcli.structures import Canvas

    size = Canvas.parse(canvas)
    rows = _method_rows(size, classes)
    if json:
        fixed = {"canvas": str(size), "classes": classes, "channels": 256, "boxes": 7, "compressed": False}
        print_json({**fixed, "methods": rows})
        return 0
    console = human_console()
    for row in rows:
        console.print(_heading(row))
        console.print(_table(row))
    console.print(CAPTION.format(canvas=size, classes=classes), markup=False)
    return 0


def _method_rows(canvas: Canvas, classes: int) -> list[dict[str, Any]]:
    """Each method, with an entry for each detector."""
    from kdcli.detectors.build import DETECTORS
    from kdcli.methods import METHODS
    from kdcli.methods.base import method_options

    return [
        {
            "method": name,
            "title": method.title,
            "evidence": method.evidence,
            "offline": method.offline,
            "options": {o: p.default for o, p in method_options(method).items()},
            "detectors": {d: _on_detector(name, method, d, canvas, classes) for d in DETECTORS},
        }
        for name, method in METHODS.items()
    ]


def _on_detector(name: str, method: type[Method], detector: str, canvas: Canvas, classes: int) -> dict[str, Any]:
    """What ``method`` is on ``detector``: ``missing`` is empty where it works; ``set``: the --set that it takes."""
    from kdcli.engine.caching.row_sizes import missing, row_bytes, specs_at
    from kdcli.engine.teacher.specs import region_spec
    from kdcli.methods.base import method_options
    from kdcli.methods.resolve import resolve_options
    from kdcli.tensors import BOX_DISTRIBUTION, BOX_REGRESSION

    options = resolve_options(name, method, detector, {})
    needs = method.reads(options)
    model, choice = _small(detector), ""
    lacking = missing(needs, model.specs())
    if lacking == [BOX_DISTRIBUTION] and BOX_REGRESSION in model.specs():
        model, choice, lacking = _small(detector, box="distribution"), "model.box=distribution", []
    if lacking:
        return {"missing": lacking}
    regions = region_spec(model.region_defaults, {name: method}, {name: options})
    sizes = row_bytes(model, specs_at(model, classes), needs, regions, canvas)
    plain = {o: p.default for o, p in method_options(method).items()}
    weights = {o: v for o, v in options.items() if _scales(o, v)}
    return {
        "missing": [],
        "set": choice,
        "needs": [n.key for n in needs],
        "weights": weights,
        "other_defaults": {o: v for o, v in options.items() if v != plain[o] and o not in weights},
        "bytes": sum(sizes.values()),
        "bytes_by_array": sizes,
        "options": _other_needs(name, method, options, model, canvas, classes),
    }


def _other_needs(
    name: str, method: type[Method], options: Mapping[str, Any], model: Detector, canvas: Canvas, classes: int
) -> list[dict[str, Any]]:
    """The single options that make ``method`` read more of a teacher than its defaults do, where ``model`` gives that.

    ``set``: the --set of each option that does the same; ``adds``: the needs on top; ``bytes``: of the whole row.
    """
    from kdcli.engine.caching.row_sizes import missing, row_bytes, specs_at
    from kdcli.engine.teacher.specs import region_spec

    plain = set(method.reads(options))
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for option, value in _switches(method, options):
        chosen = {**options, option: value}
        needs = method.reads(chosen)
        if not set(needs) - plain or missing(needs, model.specs()):
            continue
        adds = [n.key for n in needs if n not in plain]
        assignment = f"{name}.{_spelled({option: value})}"
        if tuple(adds) in found:
            found[tuple(adds)]["set"].append(assignment)
            continue
        regions = region_spec(model.region_defaults, {name: method}, {name: chosen})
        sizes = row_bytes(model, _resnet50(specs_at(model, classes)), needs, regions, canvas)
        found[tuple(adds)] = {"set": [assignment], "adds": adds, "bytes": sum(sizes.values())}
    return list(found.values())


def _resnet50(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """``specs`` with the stages of a ResNet-50, which 101 and 152 share, in the place of a small backbone's."""
    from kdcli.tensors import BACKBONE, TensorSpec

    channels = dict(zip(BACKBONE, (256, 512, 1024, 2048), strict=True))
    return {name: TensorSpec(s.per, (channels[name],)) if name in channels else s for name, s in specs.items()}


def _switches(method: type[Method], options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Other values of the options that may switch a part on: each other word of a choice, 1 for a factor that is 0."""
    hints = typing.get_type_hints(method.__init__)
    found = []
    for option, value in options.items():
        hint = hints.get(option)
        if typing.get_origin(hint) is Literal:
            found += [(option, word) for word in typing.get_args(hint) if word != value]
        elif isinstance(value, bool):
            found.append((option, not value))
        elif _scales(option, value) and not value:
            found.append((option, 1.0))
    return found


def _scales(option: str, value: object) -> bool:
    """Whether an option is a factor of a term."""
    return isinstance(value, float) and (option.endswith("weight") or option in FACTORS)


@functools.cache
def _small(detector: str, box: Literal["default", "distribution"] = "default") -> Detector:
    """A detector of few weights: its grid, assigner and tensors are those of any size."""
    from kdcli.detectors.build import ModelSpec, build_detector

    return build_detector(ModelSpec(detector, "shufflenet_v2_x0_5", 2, 32, 1, head_channels=32, box=box))


def _heading(row: dict[str, Any]) -> Text:
    """Name, source, evidence and the options that are no weights."""
    from rich.text import Text

    others = {o: v for o, v in row["options"].items() if not _scales(o, v)}
    lines = ["", f"  {row['title']}", f"  evidence: {row['evidence']}", f"  from a store: {row['offline']}"]
    if others:
        lines.append(f"  other options: {_spelled(others)}")
    return Text("\n").append(row["method"], style="bold").append("\n".join(lines))


def _table(row: dict[str, Any]) -> Table:
    """One line for each detector; detectors of which everything is the same share one."""
    from rich import box
    from rich.table import Table

    from kdcli.report.text import size

    lines: dict[tuple[tuple[str, ...], ...], list[str]] = {}  # what is printed beside the names, and below them
    for detector, found in row["detectors"].items():
        if found["missing"]:
            cells: list[tuple[str, ...]] = [(f"- (no {', '.join(found['missing'])})", "", "")]
        else:
            weights = _spelled(found["weights"]) + ("\n" if found["other_defaults"] else "")
            needs = "\n".join(found["needs"])
            cells = [(needs, weights + _spelled(found["other_defaults"]), size(found["bytes"]))]
            for more in found["options"]:
                cells.append(
                    ("\n".join(f"+ {key}" for key in more["adds"]), " or ".join(more["set"]), size(more["bytes"]))
                )
        name = detector + (f"\n  with {found['set']}" if found.get("set") else "")
        lines.setdefault(tuple(cells), []).append(name)
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, width=118)
    for title, width in (("  on", 30), ("teacher tensors", 28), ("default weights, and other defaults there", 40)):
        table.add_column(title, width=width, overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    for (first, *others), names in lines.items():
        table.add_row("\n".join(f"  {n}" for n in names), *first)
        for needs, assignments, bytes_ in others:
            table.add_row("    with", needs, assignments, bytes_)
    return table


def _spelled(options: dict[str, Any]) -> str:
    """``weight=4, form=squared``."""
    return ", ".join(f"{o}={f'{v:g}' if isinstance(v, float) else str(v).lower()}" for o, v in options.items())


@app.command()
def models(json: f.Json = False) -> int:
    """List the detectors and backbones that --model takes.

    Example: kdcli models
    """
    from kdcli.cli.progress import print_json
    from kdcli.detectors.build import model_names
    from kdcli.report.console import human_console

    if json:
        print_json({"models": model_names()})
    else:
        human_console().print("\n".join(model_names()), markup=False)
    return 0


@app.command()
def version() -> int:
    """Print the version.

    Example: kdcli version
    """
    from kdcli import __version__

    print(__version__)
    return 0
