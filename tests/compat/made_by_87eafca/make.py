"""Makes this folder. Runs with the code of commit 87eafca only, whose names it uses; README.md has the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kdcli.cache import places

from kdcli.cli.main import run
from kdcli.data.shapes import make_shapes
from kdcli.detectors.build import ModelSpec, build_detector
from kdcli.detectors.weights import export
from kdcli.engine import train
from kdcli.files import atomic_save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_backbone import NAME, install

HERE = Path(__file__).resolve().parent
ROOT = Path("/tmp/kdcli-compat")  # what manifests and config.toml name: a path without anybody's name in it

CLASSES = ("circle", "square", "triangle", "star", "cross", "ring", "hexagon", "arrow")
STORE = (
    "cache-teacher --data shapes --teacher teacher.pt --method ld,rm "
    "--shard-rows 4 --micro-batch 2 --workers 0 --threads 1"
)
RUN = "distill --config recipe.toml --threads 1 --workers 0"


def teacher() -> None:
    """Random weights, the head's enlarged, so that its outputs differ between cells."""
    torch.manual_seed(11)
    model = build_detector(ModelSpec("gfl", NAME, len(CLASSES), 8, 1, 8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("head") and parameter.ndim > 1:
                parameter *= 25.0
    classes = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    atomic_save(export(model, classes, "96x128", {}), Path("teacher.pt"))


def kdcli(line: str) -> None:
    """One command; sys.argv is what env.json keeps."""
    sys.argv = ["kdcli", *line.split()]
    assert run(sys.argv[1:]) == 0, line


def kill() -> None:
    """At once, as the kernel or a user does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_store() -> None:
    """Kill -9 in the second shard, when two of its files are there and its journal entry is not."""
    write = places.Folder.write

    def write_until(self: places.Folder, key: str, data: bytes) -> None:
        write(self, key, data)
        mine = self.path.name == "store_killed"  # not the estimate's
        if mine and len(list(self.path.glob("**/c/1/**/0"))) == 2:
            kill()

    places.Folder.write = write_until  # type: ignore[method-assign]
    kdcli(f"{STORE} --out store_killed")


def killed_run() -> None:
    """Kill -9 after the state of the fourth of nine steps: one epoch and one step."""
    save = train.save_state

    def save_until(folder: Path, progress: Any, *rest: Any) -> None:
        save(folder, progress, *rest)
        if progress.step == 4:
            kill()

    train.save_state = save_until
    kdcli(f"{RUN} --out run_killed")


def main() -> None:
    """Make everything, or, in a process of its own, what is to be killed."""
    install(pytest.MonkeyPatch())
    if sys.argv[1:]:
        return {"store": killed_store, "run": killed_run}[sys.argv[1]]()
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir()
    os.chdir(ROOT)
    os.environ["KDCLI_CACHE"] = str(ROOT / "index")
    make_shapes(Path("shapes"), num_train=6, num_val=2, seed=3, size=(96, 128))
    shutil.copy(HERE / "recipe.toml", ROOT)
    teacher()
    kdcli(f"{STORE} --out store")
    kdcli(f"{RUN} --out run")
    for what in ("store", "run"):
        died = subprocess.run([sys.executable, __file__, what], cwd=ROOT, check=False)
        assert died.returncode == -signal.SIGKILL, (what, died.returncode)
    for name in ("shapes", "store", "store_killed", "run", "run_killed"):
        shutil.rmtree(HERE / name, ignore_errors=True)
        shutil.copytree(ROOT / name, HERE / name)
    shutil.copy(ROOT / "teacher.pt", HERE)
    for unneeded in ("run/plots", "run/weights", "run_killed/plots", "run_killed/weights/best.pt"):
        path = HERE / unneeded
        path.unlink() if path.is_file() else shutil.rmtree(path)
    facts = {name: digest(name) for name in ("store", "store_killed")}
    (HERE / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def digest(store: str) -> dict[str, Any]:
    """What ``kdcli cache info --json`` says, and the name of the exact contents."""
    from kdcli.cache.writer import store_digest

    out = subprocess.run(
        [sys.executable, "-m", "kdcli", "cache", "info", store, "--json"], check=True, capture_output=True, text=True
    )
    return {"info": json.loads(out.stdout), "digest": store_digest(Path(store))}


if __name__ == "__main__":
    main()
