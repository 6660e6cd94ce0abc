"""The shape of the package: imports point one way, the library does not print, and the command's help is immediate."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdcli

PACKAGE = Path(kdcli.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# lowest first; a part may import itself and what lies below, never what lies beside it in its own layer
LAYERS = [
    {"errors"},
    {"tensors", "options", "files", "userfile"},
    {"structures"},
    {"geometry"},
    {"data", "detectors", "methods", "cache"},
    {"engine", "plugins"},
    {"report"},
    {"cli"},
]
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
# a program of its own, which the library starts: its stderr and exit code are how it answers
CHILD_PROCESSES = {"data/coco_index.py"}
FREE = {"__init__", "__main__"}  # the package's version may be read by all; __main__ is the command


def part_of(file: Path) -> str:
    """``engine`` for kdcli/engine/train.py, ``errors`` for kdcli/errors.py."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            assert node.module is not None
            # `from kdcli import cache` names a part too
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_every_part_has_a_layer() -> None:
    assert {part_of(f) for f in FILES} - FREE == set(HEIGHT)


@pytest.mark.parametrize("part", sorted(HEIGHT))
def test_imports_point_down(part: str) -> None:
    seen = 0
    for file in (f for f in FILES if part_of(f) == part):
        for line, module in imported_modules(file):
            head, _, rest = module.partition(".")
            other = rest.split(".")[0]
            if head != "kdcli" or other in (part, "__version__"):
                continue
            seen += 1
            assert HEIGHT[other] < HEIGHT[part], f"{file.relative_to(PACKAGE)}:{line}: {part} imports {module}"
    assert seen or part in ("errors", "tensors")


def test_the_version_imports_nothing() -> None:
    assert [module for _, module in imported_modules(PACKAGE / "__init__.py")] == []


def test_only_the_command_line_knows_typer() -> None:
    users = {part_of(f) for f in FILES for _, module in imported_modules(f) if module.split(".")[0] == "typer"}
    assert users == {"cli"}


def test_only_cli_and_report_print_or_exit() -> None:
    for file in FILES:
        if part_of(file) in ("cli", "report") or file.relative_to(PACKAGE).as_posix() in CHILD_PROCESSES:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{file.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Name):
                assert node.id not in ("print", "breakpoint", "input", "exit"), where
            elif isinstance(node, ast.Attribute):
                assert node.attr not in ("stdout", "stderr", "exit", "_exit"), where
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "rich" not in ast.unparse(node).split(), where


def test_nothing_is_unpickled() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not {"pickle", "dill", "joblib"} & set(ast.unparse(node).replace(".", " ").split()), file
            if not isinstance(node, ast.Call):
                continue
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{file.relative_to(PACKAGE)}:{node.lineno}"
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", where
            if name in ("np.load", "numpy.load"):
                assert keywords.get("allow_pickle", "False") == "False", where


HEAVY = ("torch", "torchvision", "zarr", "numpy", "matplotlib", "pycocotools", "PIL")
PROBE = """
import json, sys
import typer
of_typer = set(sys.modules)
sys.argv = ["kdcli", "--help"]
from kdcli.cli.main import main
try:
    main()
except SystemExit as stop:
    print(json.dumps([stop.code, sorted(set(sys.modules) - of_typer)]))
"""


def test_help_imports_the_command_line_alone() -> None:
    """What makes it immediate; benchmarks/startup.py says how long it takes."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    for command in ("train", "cache-teacher", "distill", "eval", "compare"):
        assert command in done.stdout
    code, imported = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    parts = {".".join(name.split(".")[:2]) for name in imported if name.split(".")[0] == "kdcli"}
    assert parts <= {"kdcli", "kdcli.cli", "kdcli.errors", "kdcli.store"}
    others = [name for name in imported if name.split(".")[0] != "kdcli"]
    assert not set(HEAVY) & set(others)
    assert len(others) < 10, others  # 3: of typer, and of Python
