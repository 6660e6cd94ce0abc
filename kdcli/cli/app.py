"""The Typer application that every command module adds its commands to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil object detectors from a teacher that runs once.\n\n"
    "The usual order: train (a teacher), cache-teacher, distill (students), compare. `kdcli methods` lists the "
    "distillation methods, `kdcli models` the detectors. --debug shows the traceback of an error.\n\n"
    "Example: kdcli demo --out demo",
)


@app.callback()
def load_plugins(
    context: typer.Context,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(help="Python file with detectors or methods of yours; repeatable; also KDCLI_PLUGINS=FILE:FILE."),
    ] = None,
) -> None:
    """Runs before every command."""
    files = [Path(name) for name in os.environ.get("KDCLI_PLUGINS", "").split(os.pathsep) if name]
    files += plugin or []
    if files and "--help" not in context.obj:  # a plugin imports torch: 4 s
        from kdcli.plugins import load

        load(files)
