"""What ``make test`` covers: every package, every command and every method, with what ``make test-all`` adds left out."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from kdcli.cli import main as command_line
from kdcli.cli.app import app
from kdcli.methods import METHODS
from tests.support.method_case import CASES

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]
EXPRESSION = "not slow and not gpu and not full"

assert command_line.COMMANDS  # registers the commands on ``app``


@pytest.fixture(scope="module")
def quick() -> list[str]:
    """The node ids of ``make test``."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", EXPRESSION]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_the_makefile_selects_it() -> None:
    assert f'-m "{EXPRESSION}"' in (ROOT / "Makefile").read_text()


def test_it_is_a_part_of_every_matrix(quick: list[str]) -> None:
    assert 1000 < len(quick) < 4000
    assert not [node for node in quick if node.startswith("tests/test_selection.py")]


def packages() -> list[str]:
    """Dotted names of the package's folders."""
    return [".".join(f.parent.relative_to(ROOT).parts) for f in sorted((ROOT / "kdcli").rglob("__init__.py"))]


@pytest.mark.parametrize("package", packages())
def test_every_package_is_tested(package: str, quick: list[str]) -> None:
    """By a test of its part, kdcli.engine for kdcli.engine.caching, that imports a module of it."""
    part = "/".join(["tests", *package.split(".")[1:2]])
    files = {ROOT / node.split("::")[0] for node in quick if node.startswith(part)}
    imported = {name for file in files for name in imports(file)}
    assert any(name.startswith(f"{package}.") for name in imported)


def imports(file: Path) -> Iterator[str]:
    """Dotted names of what a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command as the words that name it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


@pytest.fixture(scope="module")
def called(quick: list[str]) -> set[tuple[str, ...]]:
    """Words that follow each other in a call or a list of a quick test, or of a helper beside it: one, and two."""
    found: set[tuple[str, ...]] = set()
    by_file: dict[str, set[str]] = {}
    for node in quick:
        file, name, *_ = node.split("[")[0].split("::")
        by_file.setdefault(file, set()).add(name)
    for file, names in by_file.items():
        for function in ast.parse((ROOT / file).read_text()).body:
            if isinstance(function, ast.FunctionDef) and (function.name in names or not is_test(function)):
                for words in sequences(function):
                    found |= {words[k : k + n] for k in range(len(words)) for n in (1, 2)}
    return found


def is_test(function: ast.FunctionDef) -> bool:
    return function.name.startswith("test_")


def sequences(function: ast.FunctionDef) -> Iterator[tuple[str, ...]]:
    """The strings of each list, and of the arguments of each call."""
    for node in ast.walk(function):
        given = node.elts if isinstance(node, ast.List) else node.args if isinstance(node, ast.Call) else []
        yield tuple(str(g.value) if isinstance(g, ast.Constant) else "" for g in given)


@pytest.mark.parametrize("words", list(commands(typer.main.get_command(app))), ids=" ".join)
def test_every_command_runs(words: tuple[str, ...], called: set[tuple[str, ...]]) -> None:
    assert words in called


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_from_a_store(method: str, quick: list[str]) -> None:
    """On GFL, where all work, in the test that trains with all methods of a detector and asks for a term of each."""
    assert (method, "gfl") in CASES
    end_to_end = "tests/engine/training/test_every_method.py::test_a_lossless_store_equals_the_live_teacher"
    assert f"{end_to_end}[gfl]" in quick
