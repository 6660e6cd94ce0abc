"""A teacher without a head, from a file of mmdet to a student that learned from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.cli.main import run
from kdcli.errors import OptionError
from kdcli.store.reader import StoreReader
from tests.support.mmdet_features import cascade_mask, reppoints
from tests.support.selection import matrix
from tests.support.small_runs import CLASSES, cache_options, write
from tests.support.traces import run_setup, trace

TEACHERS: dict[str, Callable[[], dict[str, Tensor]]] = {"faster_rcnn": cascade_mask, "retinanet": reppoints}
STEPS = 6


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of ``kdcli convert --features-only``, by the student's detector whose strides they have."""
    folder, made = tmp_path_factory.mktemp("converted"), {}
    for name, make in TEACHERS.items():
        file = folder / f"{name}.pth"
        torch.save({"state_dict": make(), "meta": {"CLASSES": CLASSES}}, file)
        made[name] = folder / f"{name}.pt"
        command = ["convert", str(file), "--from", "mmdet", "--features-only", "--canvas", "96x128"]
        assert run([*command, "--out", str(made[name])]) == 0
    return made


def student(detector: str) -> dict[str, Any]:
    return {"name": f"{detector}_shufflenet_v2_x0_5", "fpn_channels": 32, "tower_convs": 1, "head_channels": 32}


CASES = [
    (detector, method)
    for detector in TEACHERS
    for method in ("cwd,fgd", "pkd", "drkd", "defeat")
    if (detector, method) != ("retinanet", "drkd")
]


@pytest.mark.parametrize(("detector", "method"), matrix(CASES, lambda case: case[1] == "cwd,fgd"))
def test_a_store_of_it_equals_the_live_teacher(
    detector: str, method: str, shapes: Path, converted: dict[str, Path], tmp_path: Path
) -> None:
    teacher = converted[detector]
    store = write(cache_options(shapes, teacher, method=method, encoding="lossless"), tmp_path / "store")
    setup: dict[str, Any] = {
        "model": student(detector),
        "gradient_limit": 0.0,
    }  # the maps of random weights are hundreds apart
    live = trace(run_setup(shapes, method, **setup, teacher=str(teacher)), tmp_path / "l", STEPS)
    cached = trace(run_setup(shapes, method, **setup, cache=str(store)), tmp_path / "c", STEPS)
    distilled = [name for name in live[0][0] if name.split("_")[0] in method.split(",")]
    assert {name.split("_")[0] for name in distilled} == set(method.split(","))
    assert all(step[name] > 0 for step in live[0] for name in distilled)
    assert live[0] == cached[0]
    assert live[1].keys() == cached[1].keys()
    assert all(torch.equal(value, cached[1][name]) for name, value in live[1].items())
    assert StoreReader(store).manifest.teacher.ap is None


def test_convert_says_what_it_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": cascade_mask(), "meta": {"CLASSES": ("a", "b")}}, tmp_path / "file.pth")
    command = ["convert", str(tmp_path / "file.pth"), "--from", "mmdet", "--out", str(tmp_path / "t.pt")]
    assert run([*command, "--features-only", "--model", "mm_features_resnet50"]) == 3
    assert "holds mm_features_resnet18, not mm_features_resnet50" in capsys.readouterr().err
    assert run(command) == 3
    assert "not a GFL, ATSS, FCOS, RetinaNet or Faster R-CNN of mmdet" in capsys.readouterr().err
    assert run([*command, "--features-only", "--set", "model.fcos=plain"]) == 3
    said = capsys.readouterr().err
    assert "--set model.fcos: not of convert --features-only, which takes model.neck alone" in said
    assert run([*command, "--features-only", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["classes"], found["left_out"]) == ("mm_features_resnet18", 2, "roi_head., rpn_head.")
    assert found["neck"] == "strides 4 to 64, P6 pooled (assumed, from 4 lateral convs)"
    assert found["spec"]["neck"] == "pool"
    torchvision = ["convert", str(tmp_path / "file.pth"), "--from", "torchvision", "--model", "retinanet_resnet50_fpn"]
    assert run([*torchvision, "--features-only", "--out", str(tmp_path / "u.pt")]) == 3
    assert "--features-only belong to --from mmdet" in capsys.readouterr().err


def test_what_needs_a_head_is_refused_in_one_line(
    shapes: Path, converted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, data, out = str(converted["retinanet"]), ["--data", str(shapes)], ["--out", str(tmp_path / "out")]
    for command in (
        ["eval", teacher, *data],
        ["predict", teacher, str(shapes), *out],
        ["train", *data, "--model", "mm_features_resnet50", *out],
        ["cache-teacher", *data, "--teacher", teacher, "--method", "fgd", "--min-teacher-ap", "10", *out],
    ):
        assert run(command) == 3
        (line,) = capsys.readouterr().err.splitlines()
        assert "mm_features_resnet50 gives features only: it has no head to train or to detect with" in line
    logits = ["cache-teacher", *data, "--teacher", teacher, "--method", "rm", *out]
    assert run(logits) == 3
    assert "method 'rm' needs cls_logits, which the" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_leaves_the_teachers_ap_out(
    shapes: Path, converted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["cache-teacher", "--data", str(shapes), "--teacher", str(converted["retinanet"]), "--method", "fgd"]
    cache += ["--views", "identity", "--workers", "0", "--threads", "1", "--micro-batch", "4"]
    assert run([*cache, "--estimate", "--out", str(tmp_path / "store")]) == 0
    assert run([*cache, "--out", str(tmp_path / "store")]) == 0
    assert "mm_features_resnet50 gives features only: the teacher's AP is left out" in capsys.readouterr().err
    assert run(["cache", "info", str(tmp_path / "store")]) == 0
    assert run(["cache", "verify", str(tmp_path / "store")]) == 0


def test_other_strides_are_refused(shapes: Path, converted: dict[str, Path]) -> None:
    with pytest.raises(
        OptionError, match=r"teacher mm_features_resnet18 has maps at strides \[4, 8, 16, 32, 64\], student"
    ):
        run_setup(shapes, "fgd", model=student("retinanet"), teacher=str(converted["faster_rcnn"]))


def test_proposals_classes_need_a_head(shapes: Path, converted: dict[str, Path]) -> None:
    table = {"defeat": {"obj_cls_weight": 2.0, "bg_cls_weight": 2.0}}
    with pytest.raises(
        OptionError, match=r"method 'defeat' needs proposals/.*the teacher mm_features_resnet18 does not"
    ):
        run_setup(
            shapes, "defeat", model=student("faster_rcnn"), methods=table, teacher=str(converted["faster_rcnn"])
        )  # fmt: skip
