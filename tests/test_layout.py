"""The tests' own floor plan: they mirror the package, and what they share lies in tests/support."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "kdcli"
FILES = sorted(TESTS.rglob("*.py"))
# what is tested here is no folder of the package
OTHERS = {"attack", "benchmarks", "compat", "docs", "examples", "golden", "packaging", "support"}


def is_test(file: Path) -> bool:
    return file.name.startswith("test_") or file.name == "conftest.py"


def imports(file: Path) -> list[str]:
    """Dotted names of everything that a file imports, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_what_tests_share_lies_in_support() -> None:
    """Or beside the test, for what is of no use elsewhere; never in another test module."""
    shared = 0
    for file in FILES:
        beside = ".".join(file.parent.relative_to(TESTS.parent).parts)
        for name in imports(file):
            if name.split(".")[0] in ("tests", "conftest"):
                where = f"{file.relative_to(TESTS)} imports {name}"
                assert name.startswith(("tests.support.", f"{beside}.")), where
                assert ".test_" not in name, where
                shared += 1
    assert shared > 50


def test_support_holds_no_tests() -> None:
    assert [f for f in (TESTS / "support").rglob("*.py") if is_test(f)] == []


def test_a_conftest_holds_fixtures_and_hooks() -> None:
    """Classes and constants that others would import belong to tests/support."""
    for file in TESTS.rglob("conftest.py"):
        tree = ast.parse(file.read_text())
        assert not [node for node in tree.body if isinstance(node, ast.ClassDef)], file
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        free = [f.name for f in functions if not f.decorator_list and not f.name.startswith("pytest_")]
        assert free == [], file


@pytest.mark.parametrize("folder", sorted({f.parent.relative_to(TESTS) for f in FILES if is_test(f)}), ids=str)
def test_folders_mirror_the_package(folder: Path) -> None:
    assert folder.parts[:1] in {(name,) for name in OTHERS} or (PACKAGE / folder).is_dir(), f"kdcli/{folder} is gone"


def test_every_folder_of_the_package_has_its_tests() -> None:
    folders = {file.parent.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py")} - {Path()}
    assert len(folders) > 15
    assert [f for f in sorted(folders) if not any((TESTS / f).rglob("test_*.py"))] == []
