"""``kdcli convert``: what it writes, prints and refuses."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from kdcli.classes import Category
from kdcli.cli.main import run
from kdcli.detectors.convert.coco import COCO_CLASSES
from kdcli.detectors.weights import load_detector
from tests.support.mmdet_case import config_text, weights
from tests.support.selection import matrix
from tests.support.wild_weights import message_hub, saved, unzipped, zipped

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


@pytest.mark.full
def test_training_files_are_taken_without_making_their_objects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """numpy scalars of mmcv's hooks under both of numpy's paths, mmengine's message hub, an old file."""
    meta = {"cfg": config_text("gfl"), "CLASSES": NAMES, "hook_msgs": {"best_score": np.float64(0.4), "n": np.ones(3)}}
    data = saved({"state_dict": weights("gfl"), "meta": meta, "message_hub": message_hub()})
    other = (b"numpy.core.multiarray", b"numpy._core.multiarray")
    pickles = [unzipped(data)["archive/data.pkl"].replace(*order) for order in (other, other[::-1])]
    assert pickles[0] != pickles[1]
    old = saved({"state_dict": weights("gfl"), "meta": meta}, old=True)
    for k, content in enumerate([*(zipped({**unzipped(data), "archive/data.pkl": p}) for p in pickles), old]):
        file, out = tmp_path / f"{k}.pth", tmp_path / f"{k}.pt"
        file.write_bytes(content)
        assert run(["convert", str(file), "--from", "mmdet", "--out", str(out)]) == 0, capsys.readouterr().err
        assert load_detector(out)[1].classes.names == list(NAMES)


def test_flat_ema_buffers_are_the_raw_weights(gfl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """mmdet 2.x swaps the two sets before it writes, so that the plain names are what it scored."""
    raw = {f"ema_{name.replace('.', '_')}": value + 1 for name, value in weights("gfl").items()}
    meta = {"cfg": config_text("gfl"), "CLASSES": NAMES}
    torch.save({"state_dict": {**weights("gfl"), **raw}, "meta": meta}, tmp_path / "ema.pth")
    shas = []
    for file in (tmp_path / "ema.pth", gfl):
        out = tmp_path / f"{file.stem}.pt"
        assert run(["convert", str(file), "--from", "mmdet", "--out", str(out), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        shas.append(found["weights_sha256"])
        if file != gfl:
            assert found["left_out"].startswith(f"ema_* ({len(raw)} raw weights of an EMA hook; the plain names hold")
    assert shas[0] == shas[1]
    strange = {**weights("gfl"), "ema_backbone_conv9_weight": torch.ones(1)}
    torch.save({"state_dict": strange, "meta": meta}, tmp_path / "x.pth")
    assert run(["convert", str(tmp_path / "x.pth"), "--from", "mmdet", "--out", str(tmp_path / "x.pt")]) == 3
    assert "no place for: ema_backbone_conv9_weight" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", matrix(["module._orig_mod.", "module.", "model.", "_orig_mod.", "parts"]))
def test_prefixes_of_wrappers(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {f"{prefix}{name}": value for name, value in weights("gfl").items()}
    if prefix == "parts":  # that were compiled
        state = {name.replace("backbone.", "backbone._orig_mod."): v for name, v in weights("gfl").items()}
    meta = {"cfg": config_text("gfl"), "CLASSES": NAMES}
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "a.pth")
    assert run(["convert", str(tmp_path / "a.pth"), "--from", "mmdet", "--out", str(tmp_path / "a.pt")]) == 0
    loaded = load_detector(tmp_path / "a.pt")[0].state_dict()["neck.p7.weight"]
    assert torch.equal(loaded, weights("gfl")["neck.fpn_convs.4.conv.weight"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state": {0: {}}, "param_groups": []}, "it is an optimiser's state without the weights of a model"),
        ({"format": "kdcli.checkpoint", "version": 1}, "it is a checkpoint of kdcli: give it to --init-from or"),
        ({"progress": {}, "module": {}, "optimizer": {}}, "it is the state of a run of kdcli"),
        ({"epoch": 3, "lr": 0.1}, "it has 'epoch', 'lr'"),
        ({}, "it is empty"),
    ],
)
def test_dictionaries_without_weights(
    content: dict[str, object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.pth"
    torch.save(content, file)
    flags = {"mmdet": [], "torchvision": ["--model", "fcos_resnet50_fpn"]}
    for source, more in flags.items():
        assert run(["convert", str(file), "--from", source, "--out", str(tmp_path / "a.pt"), *more]) == 3
        said = capsys.readouterr().err
        assert words in said
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("mean=[1.2.3, 1, 1], std=[1, 1, 1], to_rgb=True", "normalises with '1.2.3, 1, 1', not with three numbers"),
        ("mean=[., 1, 1], std=[1, 1, 1], to_rgb=True", "not with three numbers"),
        ("mean=[1, 1, 1], std=[1, 0.0, 1], to_rgb=True", "divides by a deviation of 0; say which with --style"),
        ("mean=[" + " " * 1_000_000, ""),  # took minutes
    ],
)
def test_configs_that_are_none(config: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": weights("gfl"), "meta": {"cfg": config, "CLASSES": NAMES}}, tmp_path / "a.pth")
    code = run(["convert", str(tmp_path / "a.pth"), "--from", "mmdet", "--out", str(tmp_path / "a.pt")])
    assert code == (3 if words else 0)
    assert words in capsys.readouterr().err


def test_torchvision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its 91 outputs the classes are COCO's, else they are to be named."""
    for outputs in (91, 4):
        model = torchvision.models.get_model(
            "fcos_resnet50_fpn", weights=None, weights_backbone=None, num_classes=outputs
        )
        torch.save(model.state_dict(), tmp_path / f"{outputs}.pth")
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state, "epoch": 26, "optimizer": {}}, tmp_path / "training.pth")  # of its reference scripts
    arguments = ["--from", "torchvision", "--model", "fcos_resnet50_fpn", "--out", str(tmp_path / "t.pt")]
    assert run(["convert", str(tmp_path / "4.pth"), *arguments]) == 3
    assert "does not name its 3 classes" in capsys.readouterr().err
    assert run(["convert", str(tmp_path / "91.pth"), *arguments]) == 0
    assert "tv_fcos_resnet50, 80 classes" in capsys.readouterr().err
    data, out = annotations(tmp_path / "data", (1, "a"), (2, "b"), (3, "c")), tmp_path / "training.pt"
    arguments = [*arguments[:-1], str(out), "--data", str(data), "--json"]
    assert run(["convert", str(tmp_path / "training.pth"), *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == "epoch, optimizer"
    detector, meta = load_detector(tmp_path / "t.pt")
    assert meta.classes == COCO_CLASSES
    assert detector.spec.detector == "tv_fcos"
