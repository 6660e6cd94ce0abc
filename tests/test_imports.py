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
    {"limits", "shown"},
    {"errors", "untrusted", "filetypes"},
    {"tensors", "options", "files", "digest", "userfile", "classes", "processes"},
    {"structures"},
    {"geometry"},
    {"data", "detectors", "methods", "store"},
    {"engine", "plugins"},
    {"report"},
    {"api", "demo"},
    {"cli"},
]
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
# folders of engine/ likewise: training and caching do not import each other, and loading knows neither
ENGINE_LAYERS = [{"runtime"}, {"loading"}, {"teacher"}, {"evaluation"}, {"training", "caching"}]
ENGINE_HEIGHT = {folder: height for height, layer in enumerate(ENGINE_LAYERS) for folder in layer}
# programs of their own, which the library starts (stderr and exit code are how they answer), and how such a process ends
CHILD_PROCESSES = {"data/coco_index.py", "store/storage/object_store_worker.py", "processes.py"}
FREE = {"__init__", "__main__"}  # the package's version may be read by all; __main__ is the command


def part_of(file: Path) -> str:
    """``engine`` for kdcli/engine/training/trainer.py, ``errors`` for kdcli/errors.py."""
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
    assert seen or part in ("limits", "shown", "errors", "filetypes", "tensors", "classes", "digest", "processes")


def test_the_package_itself_imports_nothing_of_its_own() -> None:
    """``import kdcli`` reads the version; what the surface offers is imported when it is asked for."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    at_once = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert at_once == ["from __future__ import annotations", "from typing import TYPE_CHECKING"]
    offered = {module.split(".")[1] for _, module in imported_modules(PACKAGE / "__init__.py") if "kdcli." in module}
    assert offered == {"api", "detectors", "errors", "methods", "tensors"}


def test_only_the_command_line_knows_typer() -> None:
    users = {part_of(f) for f in FILES for _, module in imported_modules(f) if module.split(".")[0] == "typer"}
    assert users == {"cli"}


def module_of(file: Path) -> str:
    """``kdcli.store.reader`` for its file, ``kdcli.store`` for that of the package."""
    return ".".join(("kdcli", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """The modules of the package that each one imports, inside functions too; without the package's own ``__init__``."""
    modules = {module_of(f): f for f in FILES if f != PACKAGE / "__init__.py"}
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        named = (name for _, name in imported_modules(file))
        # `from kdcli.errors import KDError` names something in the module kdcli.errors
        found = {name if name in modules else name.rpartition(".")[0] for name in named}
        graph[module] = (found & set(modules)) - {module}
    return graph


def test_nothing_imports_in_a_circle() -> None:
    graph = import_graph()
    assert len(graph) > 150
    assert sum(map(len, graph.values())) > 500
    while leaves := {module for module, imported in graph.items() if not imported}:
        graph = {module: imported - leaves for module, imported in graph.items() if module not in leaves}
    assert graph == {}  # what is left imports in a circle, or what does


def test_folders_of_the_engine_import_one_way() -> None:
    seen = 0
    for module, imported in import_graph().items():
        folder = module.removeprefix("kdcli.engine.").split(".")[0]
        for other in imported if module.startswith("kdcli.engine.") else ():
            there = other.removeprefix("kdcli.engine.").split(".")[0]
            if other.startswith("kdcli.engine.") and there != folder:
                seen += 1
                assert ENGINE_HEIGHT[there] < ENGINE_HEIGHT[folder], f"{module} imports {other}"
    assert seen > 30


def test_no_private_name_is_imported() -> None:
    """Of our own: a name that another module needs is public."""
    for file in FILES:
        for line, module in imported_modules(file):
            name = module.rpartition(".")[2]
            ours = module.startswith("kdcli.") and not name.startswith("__")
            assert not (ours and name.startswith("_")), f"{file.relative_to(PACKAGE)}:{line}: imports {module}"


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
    assert parts <= {"kdcli", "kdcli.cli", "kdcli.errors", "kdcli.limits", "kdcli.shown", "kdcli.store"}
    others = [name for name in imported if name.split(".")[0] != "kdcli"]
    assert not set(HEAVY) & set(others)
    assert len(others) < 10, others  # 3: of typer, and of Python


def _top_level(file: Path) -> Iterator[str]:
    """Functions, classes and constants of a module; commands, which typer calls, left out."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.decorator_list:
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (t.id for t in targets if isinstance(t, ast.Name))


def test_nothing_at_the_top_of_a_module_is_unused() -> None:
    """Each name is read in its own module, imported by another of the package, or an attribute somewhere (`flags.Seed`)."""
    imported = {module for file in FILES for _, module in imported_modules(file)}
    nodes = {file: list(ast.walk(ast.parse(file.read_text()))) for file in FILES}
    attributes = {n.attr for found in nodes.values() for n in found if isinstance(n, ast.Attribute)}
    exempt = {"__all__", "COMMANDS"}
    for file in FILES:
        module = ".".join(("kdcli", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        read = {n.id for n in nodes[file] if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        quoted = {n.value for n in nodes[file] if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        for name in set(_top_level(file)) - exempt - read - attributes - quoted:
            assert f"{module}.{name}" in imported, f"{module}: nothing uses {name}"
