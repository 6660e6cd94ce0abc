"""``kdcli methods``, ``kdcli models`` and ``kdcli version``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.cli import flags as f
from kdcli.cli.app import app
from kdcli.limits import MAX_CLASSES

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

Size = Annotated[str, typer.Option("--canvas", help="Image size to price, e.g. 640 or 800x1344.")]
Classes = Annotated[int, typer.Option(min=1, max=MAX_CLASSES, help="Classes to price.")]

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
    from kdcli.cli.json_output import print_json
    from kdcli.engine.caching.method_table import method_rows
    from kdcli.report.console import human_console
    from kdcli.structures import Canvas

    size = Canvas.parse(canvas)
    rows = method_rows(size, classes)
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


def _heading(row: dict[str, Any]) -> Text:
    """Name, source, evidence and the options that are no weights."""
    from rich.text import Text

    from kdcli.engine.caching.method_table import is_factor, spelled_options

    others = {o: v for o, v in row["options"].items() if not is_factor(o, v)}
    lines = ["", f"  {row['title']}", f"  evidence: {row['evidence']}", f"  from a store: {row['offline']}"]
    if others:
        lines.append(f"  other options: {spelled_options(others)}")
    return Text("\n").append(row["method"], style="bold").append("\n".join(lines))


def _table(row: dict[str, Any]) -> Table:
    """One line for each detector; detectors of which everything is the same share one."""
    from rich import box
    from rich.table import Table

    from kdcli.engine.caching.method_table import spelled_options
    from kdcli.report.text import size

    lines: dict[tuple[tuple[str, ...], ...], list[str]] = {}  # what is printed beside the names, and below them
    for detector, found in row["detectors"].items():
        if found["missing"]:
            cells: list[tuple[str, ...]] = [(f"- (no {', '.join(found['missing'])})", "", "")]
        else:
            weights = spelled_options(found["weights"]) + ("\n" if found["other_defaults"] else "")
            needs = "\n".join(found["needs"])
            cells = [(needs, weights + spelled_options(found["other_defaults"]), size(found["bytes"]))]
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


@app.command()
def models(json: f.Json = False) -> int:
    """List the detectors and backbones that --model takes.

    Example: kdcli models
    """
    from kdcli.cli.json_output import print_json
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
