"""Every option of every command and every ``--set`` key, each with values that nobody can mean.

A command line ends at the point where it would begin to write (``Reached``): what came so far is accepted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from kdcli.cli.app import app
from kdcli.cli.main import run
from kdcli.methods import METHODS
from kdcli.methods.base import method_options
from kdcli.options import ModelOptions, OptimOptions, TrainOptions
from tests.support.command_line import STUDENT

NUMBERS = (
    "-1",
    "0",
    "1000000000000",
    "9" * 40,
    "0x" + "f" * 5000,
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1e300",
    "1e300",
    "1e-320",
)
TEXTS = (
    "", " ", ",", "\x1b]0;title\x07\x1b[2J", "a" * 5000, "x y " * 50_000, "[" * 20_000, "{a=" * 3000, "\udcff\u202e",
    "../" * 2000, "crop-1000000000", "crop-" + "9" * 5000, "999968", "-", "[red]x[/red]",
)  # fmt: skip
VALUES = (*NUMBERS, *TEXTS)
COMMANDS = (
    "train", "distill", "cache-teacher", "eval", "predict", "compare", "convert", "demo", "data make-shapes", "data check",
    "cache info", "cache verify", "cache bench", "cache show", "cache add", "cache prune", "cache merge", "methods",
    "models", "version",
)  # fmt: skip
LONGEST = 2_100  # characters of a line


class Reached(Exception):
    """Everything was accepted; the command would write now."""


@dataclass(frozen=True)
class Outcome:
    """What became of one command line. ``fault``: why it is not how it should be."""

    arguments: tuple[str, ...]
    code: int | None  # None: it was accepted
    line: str
    fault: str


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and click command of each."""

    def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                yield from walk(inner, (*path, name))
        else:
            yield path, command

    return walk(typer.main.get_command(app), ())


def options(command: Any) -> list[str]:
    """The flags of a command that take a value."""
    return [p.opts[0] for p in command.params if p.param_type_name == "option" and not p.is_flag and p.name != "help"]


def set_keys() -> list[str]:
    """Every key of ``--set`` that distill knows."""
    tables = [("model", ModelOptions), ("optim", OptimOptions), ("train", TrainOptions)]
    keys = [f"{name}.{field.name}" for name, cls in tables for field in dataclasses.fields(cls)]
    return [*keys, *(f"{name}.{option}" for name, method in METHODS.items() for option in method_options(method))]


def attempt(arguments: list[str], made: list[Path]) -> Outcome:
    """Run one command line in this process; none of ``made`` may be there when it is refused."""
    out, err = io.StringIO(), io.StringIO()
    code: int | None
    fault = ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run(arguments)
        except Reached:
            code = None
        except BaseException:
            code, fault = 1, traceback.format_exc()[-1500:]
    printed = err.getvalue()
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    if not fault and code is not None:
        if code not in (0, 2, 3, 4, 5, 6):
            fault = f"exit code {code}"
        elif code and len(errors) != 1:
            fault = f"{len(errors)} lines of error: {printed[:500]}"
        elif code and (left := [str(p) for p in made if p.exists()]):
            fault = f"left {left}"
    if not fault and max(map(len, printed.splitlines()), default=0) > LONGEST:
        fault = f"a line of {max(map(len, printed.splitlines()))} characters"
    if not fault and not all(c.isprintable() or c in "\n" or c > "\x9f" for c in printed + out.getvalue()):
        fault = f"control characters: {printed[:300]!r}"
    return Outcome(tuple(a[:60] for a in arguments), code, errors[0] if errors else "", fault)


def command_line(command: str, data: Path, teacher: Path, store: Path, out: Path) -> list[str]:
    """A small right command line, to which a wrong value is added."""
    image = sorted((data / "val").iterdir())[0]
    lines: dict[str, list[object]] = {
        "train": ["--data", data, *STUDENT, "--out", out],
        "distill": ["--data", data, *STUDENT, "--cache", store, "--method", "ld", "--out", out],
        "cache-teacher": ["--data", data, "--teacher", teacher, "--method", "ld", "--out", out, "--workers", "0"],
        "eval": [teacher, "--data", data, "--workers", "0"],
        "predict": [teacher, image, "--out", out],
        "compare": [data],
        "convert": [teacher, "--from", "mmdet", "--out", out],
        "demo": ["--out", out],
        "data make-shapes": [out, "--train", "1", "--val", "1"],
        "data check": [data],
        "cache info": [store],
        "cache verify": [store],
        "cache bench": [store, "--workers", "0", "--rows", "2", "--batch", "1"],
        "cache show": [store, "1", "--out", out.with_suffix(".png"), "--data", data],
        "cache add": [store, "--method", "ld"],
        "cache prune": [store, "--view", "hflip", "--out", out],
        "cache merge": [store, store, "--out", out],
        **{name: [] for name in ("methods", "models", "version")},
    }
    return [*command.split(), *map(str, lines[command])]


def stop_before_writing(patch: pytest.MonkeyPatch) -> None:
    """Raise ``Reached`` where a command that takes long would make its output."""
    import kdcli.api.caching
    import kdcli.data.shapes
    import kdcli.demo
    import kdcli.engine.caching.estimate.estimate
    from kdcli.engine.training import run_folder

    def reached(*arguments: object, **options: object) -> None:
        raise Reached

    patch.setattr(run_folder, "create_run", reached)
    patch.setattr(kdcli.api.caching, "write", reached)
    patch.setattr(kdcli.demo, "run_demo", reached)
    patch.setattr(kdcli.engine.caching.estimate.estimate, "estimate", reached)
    patch.setattr(kdcli.data.shapes, "make_shapes", reached)
