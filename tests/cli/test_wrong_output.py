"""Places that cannot be written, disks that fill up and inputs that are half bad: one line, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image

from kdcli.api.caching import require_room
from kdcli.cli import train
from kdcli.cli.main import run, show_warning
from kdcli.data import shapes as shapes_module
from kdcli.detectors.backbones import Backbone, load_backbone_weights
from kdcli.detectors.dense.head import group_count
from kdcli.engine.caching.estimate.estimate import Estimate, break_even
from kdcli.engine.training import launch
from kdcli.errors import NoSpaceError
from kdcli.files import atomic_write_bytes
from tests.support.command_line import refused
from tests.support.small_runs import CANVAS


@pytest.fixture
def copy(shapes: Path, tmp_path: Path) -> Path:
    """A data set to damage."""
    target = tmp_path / "data"
    shutil.copytree(shapes, target)
    return target


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fsync finds the disk full."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_nothing(
    capsys: pytest.CaptureFixture[str], shapes: Path, teacher: Path, default_store: Path, tmp_path: Path
) -> None:
    line = refused(capsys, 5, "cache", "show", default_store, "1", "--out", tmp_path / "row.png")
    assert line == f"error: {tmp_path / 'row.png'}: the disk is full; free some space or choose another place"
    assert list(tmp_path.iterdir()) == []
    line = refused(capsys, 5, "predict", teacher, shapes / "val", "--out", tmp_path / "drawn")
    assert "00000.png: the disk is full" in line
    assert list((tmp_path / "drawn").iterdir()) == []
    for out in (tmp_path / "new", tmp_path / "drawn"):  # a folder to make, an empty one
        line = refused(capsys, 5, "data", "make-shapes", out, "--train", "1", "--val", "1")
        assert line == f"error: {out}: the disk is full; free some space or choose another place"
    assert [p.name for p in tmp_path.rglob("*")] == ["drawn"]


def test_shapes_in_an_empty_folder_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".shapes.json.making" / "train").mkdir(parents=True)  # what a kill leaves
    monkeypatch.chdir(tmp_path)
    assert run(["data", "make-shapes", ".", "--train", "1", "--val", "1"]) == 0
    assert sorted(os.listdir(".")) == ["annotations", "shapes.json", "train", "val"]


def test_predict_looks_at_every_image_first(
    capsys: pytest.CaptureFixture[str], shapes: Path, teacher: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(shapes / "val", images)
    torn = sorted(images.iterdir())[-1]
    torn.write_bytes(torn.read_bytes()[:600])
    text = tmp_path / "text.png"
    text.write_text("no image")
    for source, bad in ((images, torn), (torn, torn), (text, text)):
        line = refused(capsys, 3, "predict", teacher, source, "--out", tmp_path / "drawn")
        assert str(bad) in line
        assert "BytesIO" not in line
        assert not (tmp_path / "drawn").exists()


def test_places_are_looked_at_before_the_work(
    capsys: pytest.CaptureFixture[str], shapes: Path, teacher: Path, default_store: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file = tmp_path / "file"
    file.write_text("mine")
    show = ["cache", "show", default_store, "1", "--out"]
    assert f"'{tmp_path / 'r.png'}'" in refused(capsys, 3, *show, tmp_path / "r.xyz")
    assert "is a folder" in refused(capsys, 3, *show, tmp_path)
    assert f"lies below '{file}'" in refused(capsys, 3, *show, file / "deep" / "r.png")

    from kdcli.engine.evaluation import evaluate as evaluation

    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: pytest.fail("evaluated first"))
    for command in (["eval", teacher, "--data", shapes], ["predict", teacher, shapes / "val"]):
        line = refused(capsys, 3, *command, "--out", file)
        assert line == f"error: --out '{file}' is not a folder; name a folder to write to"
        assert f"lies below '{file}'" in refused(capsys, 3, *command, "--out", file / "x")
    assert "--html" in refused(capsys, 3, "compare", tmp_path, "--html", tmp_path)
    assert "--plots" in refused(capsys, 3, "compare", tmp_path, "--plots", file)
    line = refused(capsys, 3, "data", "make-shapes", file / "x", "--train", "1", "--val", "1")
    assert line == f"error: OUT '{file / 'x'}' lies below '{file}', which is not a folder; name another place"
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "code", "end"),
    [
        (errno.ENOSPC, 5, "; free some space or choose another place"),
        (errno.EROFS, 3, "; choose another place"),
        (errno.EACCES, 3, "; change its permissions or choose another place"),
        (errno.EIO, 3, "; look at the disk or file system that it is on, or choose another place"),
    ],
)
def test_the_fix_suits_the_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int,
    end: str,
) -> None:  # fmt: skip
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), "/a/place")

    monkeypatch.setattr(shapes_module, "make_shapes", fail)
    line = refused(capsys, code, "data", "make-shapes", tmp_path / "out")
    assert line == f"error: /a/place: {os.strerror(number)}{end}"


def test_the_temporary_file_is_not_named(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        atomic_write_bytes(tmp_path, b"data")
    assert str(caught.value) == f"[Errno 21] Is a directory: '{tmp_path}'"


def _check(capsys: pytest.CaptureFixture[str], data: Path) -> tuple[dict[str, Any], list[str]]:
    capsys.readouterr()
    assert run(["data", "check", str(data), "--json"]) == 3
    out, err = capsys.readouterr()
    return json.loads(out), err.splitlines()


@pytest.mark.parametrize("split", ["train", "val"])
def test_check_wants_both_splits(capsys: pytest.CaptureFixture[str], copy: Path, split: str) -> None:
    file = copy / "annotations" / f"{split}.json"
    file.unlink()
    found, lines = _check(capsys, copy)
    assert [f["kind"] for f in found[split]["faults"]] == ["missing split"]
    assert f"  fault: missing split: no split '{split}' under {copy}" in "\n".join(lines)
    assert found["val" if split == "train" else "train"]["faults"] == []
    file.mkdir()  # a folder in its place
    found, lines = _check(capsys, copy)
    assert [f["kind"] for f in found[split]["faults"]] == ["unreadable split"]
    assert f"{file} is not a file" in "\n".join(lines)


def test_check_compares_the_categories(capsys: pytest.CaptureFixture[str], copy: Path) -> None:
    file = copy / "annotations" / "val.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "disc"
    file.write_text(json.dumps(content))
    found, _ = _check(capsys, copy)
    (fault,) = found["val"]["faults"]
    assert fault["kind"] == "different categories"
    assert "(circle, disc in one alone)" in fault["message"]


def test_a_fault_is_one_line_without_addresses(
    capsys: pytest.CaptureFixture[str], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    image = sorted((copy / "train").iterdir())[0]
    image.write_text("no image")
    found, lines = _check(capsys, copy)
    (fault,) = found["train"]["faults"]
    reason = f"image {image} cannot be decoded (of no known image format); replace the file"
    assert fault["message"] == reason
    assert f"  fault: corrupt image: image 1 ({image.name}): {reason}" in lines
    line = refused(capsys, 3, "train", "--data", copy, "--model", "gfl_resnet18", "--out", copy / "run")
    assert "has 1 fault, first corrupt image" in line


def test_names_that_are_nearly_right(capsys: pytest.CaptureFixture[str], shapes: Path, tmp_path: Path) -> None:
    train = ["train", "--canvas", CANVAS, "--out", tmp_path / "run", "--data"]
    line = refused(capsys, 3, *train, shapes, "--model", "gfl")
    assert line.startswith("error: model 'gfl': unknown; did you mean 'gfl_resnet18'? `kdcli models` lists them")
    line = refused(capsys, 3, *train, shapes, "--model", "zzz")
    assert line.startswith("error: model 'zzz': unknown; `kdcli models` lists them")
    assert len(line) < 140
    file = shapes / "annotations" / "train.json"
    assert f"data folder {file} is not a folder" in refused(capsys, 3, *train, file, "--model", "gfl_resnet18")


def test_a_small_store_is_not_of_zero_gigabytes(tmp_path: Path) -> None:
    found = Estimate(
        rows=1, bytes_total=3_000_000, bytes_by_tensor={}, bytes_by_array={}, bytes_raw=0, seconds=1, rows_per_s=1,
        slowest="teacher", disk_timed=True, free_bytes=1_000_000, counted_rows=1, probed_rows=1,
        break_even=break_even(1, 1, 1),
    )  # fmt: skip
    with pytest.raises(NoSpaceError, match=r"needs about 3\.3 MB, the disk of .* has 1\.0 MB free"):
        require_room(found, str(tmp_path))
    require_room(replace(found, free_bytes=3_400_000), str(tmp_path))
    require_room(replace(found, free_bytes=None), "s3://bucket/store")


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show_warning)
        assert group_count(24) == 24
    assert capsys.readouterr().err == "warning: head of 24 channels: GroupNorm has 24 groups instead of 32\n"


def test_a_download_leaves_stdout_alone(
    capsys: pytest.CaptureFixture[str], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = Backbone("shufflenet_v2_x0_5")
    metrics = {"ap": 1.0, "epochs": 1, "wall_s": 1.0}

    def answer(url: str, **options: object) -> dict[str, torch.Tensor]:
        sys.stdout.write(f'Downloading: "{url}"\n')  # as torch.hub does
        return backbone.state_dict()

    def start(*arguments: object, **options: object) -> tuple[Path, dict[str, float]]:
        load_backbone_weights(backbone, "imagenet")
        return tmp_path, metrics

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", answer)
    monkeypatch.setattr(launch, "start", start)
    monkeypatch.setattr(train, "_draw", lambda finished: None)
    train_it = ["train", "--data", str(shapes), "--model", "gfl_shufflenet_v2_x0_5", "--out", str(tmp_path / "run")]
    assert run([*train_it, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"run": str(tmp_path), **metrics}
    assert err.startswith("Downloading")
    assert run(train_it) == 0
    assert "AP 1.00 after 1 epoch, 1 s" in capsys.readouterr().err


def test_images_are_pngs(shapes: Path, default_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "ROW.PNG"
    assert run(["cache", "show", str(default_store), "1", "--out", str(out), "--data", str(shapes)]) == 0
    with Image.open(out) as picture:
        assert picture.format == "PNG"
    assert [p.name for p in out.parent.iterdir()] == ["ROW.PNG"]


def test_cache_teacher_looks_at_its_place_first(
    capsys: pytest.CaptureFixture[str], shapes: Path, teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    flags = ["--data", str(shapes), "--teacher", str(teacher), "--method", "rm"]
    assert run(["cache-teacher", *flags, "--out", str(tmp_path / "file" / "store")]) == 3
    err = capsys.readouterr().err
    assert "which is not a folder" in err
    assert "estimate" not in err
