"""The examples of a loop of one's own, each run as a reader runs it, on drawn images."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.selection import matrix
from tests.support.small_runs import cache_options, write

FOLDER = Path(__file__).parents[2] / "examples" / "own_loop"


@pytest.fixture(scope="module")
def store(shapes: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features that PKD and CWD read."""
    return write(cache_options(shapes, teacher, method="pkd"), tmp_path_factory.mktemp("own_loop") / "store")


def run(name: str, *arguments: object, folder: Path) -> str:
    """Standard output of an example, whose warnings are errors of ours alone."""
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_torch(shapes: Path, store: Path, tmp_path: Path) -> None:
    lines = run("plain_torch.py", shapes, store, folder=tmp_path).splitlines()
    losses = [float(found) for found in re.findall(r"'pkd_loss': ([\d.]+)", "\n".join(lines))]
    assert len(losses) == len(lines) == 7  # 24 images in batches of 4, of two orientations
    assert all(0 < loss < 100 for loss in losses)
    assert losses[-1] < losses[0]
    assert "'bbox_ctrness'" in lines[0]


@pytest.mark.parametrize("start", matrix(["fork", "spawn"]))
def test_dataset(start: str, shapes: Path, store: Path, tmp_path: Path) -> None:
    assert run("dataset.py", shapes, store, start, folder=tmp_path) == f"24 images, {start}\n"


@pytest.mark.skipif(find_spec("lightning") is None, reason="needs pip install lightning")
def test_lightning_module(shapes: Path, store: Path, tmp_path: Path) -> None:
    last = run("lightning_module.py", shapes, store, folder=tmp_path).splitlines()[-1]
    assert float(re.findall(r"'cwd_loss': ([\d.]+)", last)[0]) > 0
    assert "'classification'" in last
