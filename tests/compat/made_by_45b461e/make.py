"""Makes this folder. Runs with the code of commit 45b461e only; README.md has the command."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.classes import ClassList
from kdcli.cli.main import run
from kdcli.detectors.backbones import Backbone
from kdcli.detectors.build import ModelSpec, build_detector
from kdcli.detectors.weights import export
from kdcli.engine.training import trainer
from kdcli.files import atomic_save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_backbone import NAME, install

HERE = Path(__file__).resolve().parent
SHAPES = HERE.parent / "made_by_87eafca" / "shapes"
ROOT = Path("/tmp/kdcli-compat")  # what config.toml names: a path without anybody's name in it
CLASSES = ("circle", "square", "triangle", "star", "cross", "ring", "hexagon", "arrow")

COMMON = (
    "--data shapes --canvas 96x128 --epochs 3 --batch 2 --seed 5 --workers 0 --threads 1 --set train.save_steps=2 "
    "--set model.fpn_channels=4 --set model.tower_convs=1 --set optim.lr=0.02 --backbone-weights tiny.pth"
)
RUNS = {
    "norms": f"train {COMMON} --model gfl_tiny",
    "pfi": f"distill {COMMON} --model retinanet_tiny --teacher teacher.pt --method pfi --set pfi.weight=300.0",
}


def weights() -> None:
    """A backbone whose batch norms have statistics, scales and shifts of their own; a RetinaNet with random weights, made
    larger so that features and probabilities differ between cells."""
    torch.manual_seed(13)
    backbone = Backbone(NAME)
    for _ in range(3):
        backbone(torch.rand(4, 3, 96, 128) * 4 - 2)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    atomic_save(backbone.state_dict(), Path("tiny.pth"))
    model = build_detector(ModelSpec("retinanet", NAME, len(CLASSES), 4, 1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith(("neck", "head")):
                parameter *= 4.0
            if parameter.ndim == 1 and name.startswith("head"):
                parameter.clamp_(min=-1.0)  # the class bias of -4.6 keeps all probabilities at 0.01
    atomic_save(export(model, ClassList.numbered(CLASSES), "96x128", {}), Path("teacher.pt"))


def killed(name: str) -> None:
    """Kill -9 after the state of the fourth of nine steps: one epoch and one step."""
    save = trainer.save_state

    def save_until(folder: Path, progress: Any, *rest: Any) -> None:
        save(folder, progress, *rest)
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.save_state = save_until
    run([*RUNS[name].split(), "--out", f"{name}_killed"])


def main() -> None:
    """Make everything, or, in a process of its own, what is to be killed."""
    install(pytest.MonkeyPatch())
    if sys.argv[1:]:
        return killed(sys.argv[1])
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir()
    os.chdir(ROOT)
    os.environ["KDCLI_CACHE"] = str(ROOT / "index")
    shutil.copytree(SHAPES, "shapes")
    weights()
    for name, line in RUNS.items():
        sys.argv = ["kdcli", *line.split()]  # what env.json keeps
        assert run([*line.split(), "--out", name]) == 0
        died = subprocess.run([sys.executable, __file__, name], cwd=ROOT, check=False)
        assert died.returncode == -signal.SIGKILL, died.returncode
        shutil.copytree(ROOT / f"{name}_killed", HERE / f"{name}_killed", dirs_exist_ok=True)
        (HERE / name).mkdir(exist_ok=True)
        for file in ("results.csv", "metrics.json", "config.toml"):
            shutil.copy(ROOT / name / file, HERE / name)
        (HERE / f"{name}_killed" / "weights" / "best.pt").unlink()
        shutil.rmtree(HERE / f"{name}_killed" / "plots")
    for file in ("tiny.pth", "teacher.pt"):
        shutil.copy(file, HERE)


if __name__ == "__main__":
    main()
