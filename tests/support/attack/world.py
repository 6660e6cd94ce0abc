"""The tiny world that is attacked: a data set, teachers, stores, runs; made once in a folder, then only copied from."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.attack import child, tiny

CANVAS = "64x96"
HERE = ["--workers", "0", "--threads", "1"]
SMALL = ["--canvas", CANVAS, "--batch", "2", *HERE, *tiny.MODEL]
READY = "ready"


@dataclass(frozen=True)
class World:
    """Where everything is. Nothing in it is ever written to after it was made."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        """``world.store`` is the folder of this name, ``world.teacher_pt`` the file ``teacher.pt``."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self.root / (f"{name[:-3]}.{name[-2:]}" if name.endswith("_pt") else name)

    def cache_teacher(self, out: Path, *, data: Path | None = None, teacher: Path | None = None) -> list[str]:
        """The command that wrote the stores."""
        return [
            *("cache-teacher", "--data", str(data or self.shapes), "--teacher", str(teacher or self.teacher_pt)),
            *("--method", "ld,pfi", "--shard-rows", "4", "--micro-batch", "2", *HERE, "--out", str(out)),
        ]

    def distill(self, out: Path, *, store: Path | None = None, data: Path | None = None, epochs: int = 1) -> list[str]:
        """A distillation from a store."""
        return [
            *("distill", "--data", str(data or self.shapes), "--cache", str(store or self.store)),
            *("--method", "ld,pfi", "--epochs", str(epochs), *SMALL, "--set", "train.save_steps=1", "--out", str(out)),
        ]

    def train(self, out: Path, *, data: Path | None = None) -> list[str]:
        """Plain training."""
        return ["train", "--data", str(data or self.shapes), "--epochs", "1", *SMALL, "--out", str(out)]


def make_world(root: Path) -> World:
    """The world in ``root``, made if it is not there; each command in a child of this process."""
    world = World(root)
    if (root / READY).is_file():
        return world
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    _call(partial(_data, world), root)
    for name in ("plain", "other"):
        _run([*world.train(root / name), "--seed", "0" if name == "plain" else "7"], root)
    _call(partial(_teachers, world), root)
    _run(world.cache_teacher(world.store), root)
    _run(world.cache_teacher(world.store_b, teacher=root / "teacher_b.pt"), root)
    _run([*world.cache_teacher(root / "store_main"), "--method", "rm"], root)
    for view, name in (("hflip", "store_identity"), ("identity", "store_hflip")):
        _run(["cache", "prune", str(world.store), "--view", view, "--out", str(root / name)], root)
    _run(["cache", "prune", str(_copied(world.store, root / "store_ld")), "--tensor", "features@all"], root)
    _run(world.distill(world.run, epochs=2), root)
    _stopped(world, "stopped", 4)
    _stopped(world, "stopped_late", 3)
    (root / READY).write_text("")
    return world


def _copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def _call(work: Any, root: Path) -> None:
    def quiet() -> int:
        work()
        return 0

    out, err = root / "stdout", root / "stderr"
    found = child.wait(child.fork(quiet, out, err), out, err, 0.0)
    assert found.code == 0, found.err


def _run(arguments: list[str], root: Path) -> None:
    found = child.run(arguments, root)
    assert found.code == 0, (arguments, found.err)


def _data(world: World) -> None:
    """Six and two images, and a file of mmdet's for ``convert``."""
    import torch

    from kdcli.data.shapes import make_shapes
    from tests.support.mmdet_case import config_text, weights

    make_shapes(world.shapes, num_train=6, num_val=2, seed=3, size=(64, 96))
    meta = {"cfg": config_text("gfl"), "dataset_meta": {"classes": ("disk", "box", "star")}}
    torch.save({"state_dict": weights("gfl"), "meta": meta}, world.root / "mmdet.pth")


def _teachers(world: World) -> None:
    """Two checkpoints whose outputs differ between cells."""
    import torch

    from kdcli.files import atomic_save

    for run, name in (("plain", "teacher.pt"), ("other", "teacher_b.pt")):
        content = torch.load(world.root / run / "weights" / "last.pt", weights_only=True)
        tiny.enlarge_head(content["weights"])
        atomic_save(reseal(content), world.root / name)


def reseal(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint with the digests that its contents have, as somebody makes them who knows how."""
    from kdcli.detectors import weights

    sealed = {**checkpoint, "weights_sha256": weights.weights_sha256(checkpoint["weights"])}
    if "digest" in sealed:  # over the rest of the file
        digest_of = importlib.import_module("kdcli.digest").digest_of
        sealed["digest"] = digest_of({k: v for k, v in sealed.items() if k not in ("weights", "digest")})
    return sealed


def _stopped(world: World, name: str, step: int) -> None:
    """A run that was killed after the state of step ``step`` of six was written."""

    def work() -> int:
        from kdcli.engine.training.checkpoint import TrainingState

        trainer: Any = importlib.import_module("kdcli.engine.training.trainer")
        save = trainer.save_state

        def save_until(*parts: Any, **more: Any) -> None:
            save(*parts, **more)
            if next(part for part in parts if isinstance(part, TrainingState)).step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.save_state = save_until
        return child.command(world.distill(world.root / name, epochs=2))

    out, err = world.root / "stdout", world.root / "stderr"
    found = child.wait(child.fork(work, out, err), out, err, 0.0)
    assert found.code == -signal.SIGKILL, found.err
    assert json.loads((world.root / name / "env.json").read_text())
