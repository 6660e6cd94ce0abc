"""What is released: the wheel and the sdist, their contents, and the demo from the installed wheel. No network is used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import kdcli

ROOT = Path(__file__).parents[2]


def python(*arguments: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """The stdout of a Python command that must succeed."""
    command = [sys.executable, *(str(a) for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=cwd, env=env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--no-isolation", "--outdir", out, ROOT)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return dist / f"kdcli-{kdcli.__version__}-py3-none-any.whl"


@pytest.mark.full
def test_metadata_is_as_a_package_index_wants_it(dist: Path) -> None:
    names = [f"kdcli-{kdcli.__version__}-py3-none-any.whl", f"kdcli-{kdcli.__version__}.tar.gz"]
    assert sorted(p.name for p in dist.iterdir()) == names
    assert python("-m", "twine", "check", "--strict", *dist.iterdir()).count("PASSED") == 2


@pytest.mark.full
def test_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {n for n in file.namelist() if ".dist-info/" not in n}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "kdcli").rglob("*.py")}
    assert names == sources | {"kdcli/py.typed"}


@pytest.mark.full
def test_sdist_has_what_its_tests_and_pages_need(dist: Path) -> None:
    with tarfile.open(dist / f"kdcli-{kdcli.__version__}.tar.gz") as file:
        names = {n.partition("/")[2] for n in file.getnames()}
    for part in ("kdcli", "tests", "docs", "examples", "benchmarks"):
        files = (p for p in (ROOT / part).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        assert {p.relative_to(ROOT).as_posix() for p in files} <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "constraints.txt", "Makefile"} <= names


@pytest.mark.full
def test_demo_runs_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    python("-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", target, wheel)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    where = python("-c", "import kdcli; print(kdcli.__file__)", cwd=empty, env=environment)
    assert Path(where.strip()) == target / "kdcli" / "__init__.py"
    command = [target / "bin" / "kdcli", "demo", "--quick", "--out", tmp_path / "demo"]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "<html" in (tmp_path / "demo" / "report.html").read_text()
    assert list(empty.iterdir()) == [], "the demo wrote outside --out"


def test_hooks_have_the_versions_that_make_check_has() -> None:
    pinned = set((ROOT / "constraints.txt").read_text().split())
    hooks = re.findall(r"additional_dependencies: \[(\S+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert {h.partition("==")[0] for h in hooks} == {"ruff", "codespell"}
    assert set(hooks) <= pinned
