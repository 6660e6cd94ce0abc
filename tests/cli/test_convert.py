"""``kdcli convert``: what it writes, prints and refuses."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
import torch
import torchvision

from kdcli.classes import Category
from kdcli.cli.main import run
from kdcli.detectors.convert.coco import COCO_CLASSES
from kdcli.detectors.weights import load_detector
from tests.support.mmdet_case import config_text, weights

NAMES = ("disk", "box", "star")


@pytest.fixture(scope="module")
def gfl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("mmdet") / "gfl.pth"
    meta = {"cfg": config_text("gfl"), "dataset_meta": {"classes": NAMES}}
    torch.save({"state_dict": weights("gfl"), "meta": meta}, file)
    return file


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No class names, no config."""
    file = tmp_path_factory.mktemp("mmdet") / "bare.pth"
    torch.save(weights("fcos_normalised"), file)
    return file


def annotations(root: Path, *categories: tuple[int, str]) -> Path:
    (root / "annotations").mkdir(parents=True)
    (root / "train").mkdir()
    listed = [{"id": number, "name": name} for number, name in categories]
    content = {"images": [], "annotations": [], "categories": listed}
    (root / "annotations" / "train.json").write_text(json.dumps(content))
    return root


def test_writes_a_checkpoint(gfl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "teacher.pt"
    arguments = ["convert", str(gfl), "--from", "mmdet", "--canvas", "64x96", "--out", str(out)]
    assert run([*arguments, "--model", "gfl_resnet18"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "gfl_resnet18, 3 classes, 11," in said
    assert "canvas 64x96 style: pytorch (the config in the file)" in said
    detector, meta = load_detector(out)
    assert detector.spec.reg_max == 8
    assert meta.classes.names == list(NAMES)
    assert meta.canvas == "64x96"
    assert meta.extra == {"converted_from": "mmdet", "file": "gfl.pth"}
    assert run(arguments) == 3
    assert f"error: '{out}' exists; choose another --out" in capsys.readouterr().err


def test_json(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = annotations(tmp_path / "data", (7, "star"), (2, "box"), (5, "disk"))
    out = tmp_path / "t.pt"
    assert run(["convert", str(bare), "--from", "mmdet", "--data", str(data), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "fcos_resnet18"
    assert found["fcos"] == found["spec"]["fcos"] == "normalised"
    assert found["canvas"] == "800x1344"
    assert found["style"] == "pytorch (batch norms with statistics)"
    assert load_detector(out)[1].classes == (Category(2, "box"), Category(5, "disk"), Category(7, "star"))


def test_wanted_prefix_and_variant(gfl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = {k: v for k, v in weights("fcos_normalised").items() if "_convs." not in k or "conv.bias" not in k}
    plain |= {k: v for k, v in weights("fcos_normalised").items() if k.startswith("neck.")}
    both = {**weights("gfl"), **{f"teacher_model.{k}": v for k, v in plain.items()}}
    torch.save({"state_dict": both, "meta": {"CLASSES": NAMES}}, tmp_path / "both.pth")
    out = tmp_path / "t.pt"
    flags = ["--prefix", "teacher_model", "--set", "model.fcos=normalised", "--style", "caffe", "--json"]
    assert run(["convert", str(tmp_path / "both.pth"), "--from", "mmdet", "--out", str(out), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["fcos"], found["style"]) == ("fcos_resnet18", "normalised", "caffe (--style)")
    assert run(["convert", str(tmp_path / "both.pth"), "--from", "mmdet", "--out", str(tmp_path / "u.pt")]) == 0
    assert "left out: teacher_model." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{gfl}", "--from", "mmdte"], 3, "--from 'mmdte': unknown; did you mean 'mmdet'?"),
        (["{gfl}", "--from", "mmdet", "--canvas", "100"], 3, "canvas 100: each side must be a positive multiple of 32"),
        (["{gfl}", "--from", "mmdet", "--classes", "coco"], 3, "--classes coco: 80 classes, the model has 3"),
        (["{gfl}", "--from", "mmdet", "--classes", "voc"], 3, "--classes 'voc': only coco is known by name; give"),
        (["{gfl}", "--from", "mmdet", "--classes", "coco", "--data", "x"], 2, "both name the classes: give one"),
        (["{gfl}", "--from", "mmdet", "--model", "gfl_resnet50"], 3, "holds gfl_resnet18, not gfl_resnet50"),
        (["{gfl}", "--from", "mmdet", "--set", "model.reg_max=4"], 3, "--set model.reg_max: not of convert"),
        (["{gfl}", "--from", "mmdet", "--style", "cafe"], 3, "gfl.pth: --style 'cafe': unknown; did you mean 'caffe'?"),
        (["{gfl}", "--from", "mmdet", "--prefix", "student"], 3, "--prefix 'student': no detector of that prefix"),
        (["{bare}", "--from", "mmdet"], 3, "the file does not name its 3 classes; give them with --classes coco or"),
        (["{bare}", "--from", "mmdet", "--set", "model.fcos=fancy"], 3, "model.fcos = 'fancy'; choose from"),
        (["{bare}", "--from", "mmdet", "--data", "nowhere"], 3, "data folder nowhere does not exist"),
        (["nowhere.pth", "--from", "mmdet"], 3, "mmdet file 'nowhere.pth': no such file"),
        (["{bare}", "--from", "torchvision"], 2, "--model is missing: name torchvision's model, one of retinanet_"),
        (["{gfl}", "--from", "torchvision", "--model", "fcos_resnet50_fpn"], 3, "gfl.pth: not a state dict; save"),
        (["{bare}", "--from", "torchvision", "--model", "fcos_resnet50_fpn"], 3, "take the state dict of a whole det"),
        (["{bare}", "--from", "torchvision", "--style", "caffe"], 3, "belong to --from mmdet; leave them out"),
        (["{bare}"], 2, "--from"),
    ],
)
def test_refusals(
    arguments: list[str], code: int, message: str, gfl: Path, bare: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [a.format(gfl=gfl, bare=bare) for a in arguments]
    assert run(["convert", *words, "--out", str(tmp_path / "t.pt")]) == code
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_nothing_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As mmengine's own checkpoints of a training, which hold its message hub."""
    torch.save({"state_dict": weights("gfl"), "message_hub": datetime.date(2024, 1, 1)}, tmp_path / "epoch_12.pth")
    arguments = ["convert", str(tmp_path / "epoch_12.pth"), "--from", "mmdet", "--out", str(tmp_path / "t.pt")]
    assert run(arguments) == 3
    said = capsys.readouterr().err
    assert "not a PyTorch file of plain tensors" in said
    assert "tools/model_converters/publish_model.py" in said


def test_torchvision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its 91 outputs the classes are COCO's, else they are to be named."""
    for outputs in (91, 4):
        model = torchvision.models.get_model(
            "fcos_resnet50_fpn", weights=None, weights_backbone=None, num_classes=outputs
        )
        torch.save(model.state_dict(), tmp_path / f"{outputs}.pth")
    arguments = ["--from", "torchvision", "--model", "fcos_resnet50_fpn", "--out", str(tmp_path / "t.pt")]
    assert run(["convert", str(tmp_path / "4.pth"), *arguments]) == 3
    assert "does not name its 3 classes" in capsys.readouterr().err
    assert run(["convert", str(tmp_path / "91.pth"), *arguments]) == 0
    assert "tv_fcos_resnet50, 80 classes" in capsys.readouterr().err
    detector, meta = load_detector(tmp_path / "t.pt")
    assert meta.classes == COCO_CLASSES
    assert detector.spec.detector == "tv_fcos"
