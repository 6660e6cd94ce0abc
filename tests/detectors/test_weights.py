"""Checkpoints: what comes back is what was saved, bit for bit, or an error of one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from kdcli.classes import Category, ClassList
from kdcli.detectors.base import ModelSpec
from kdcli.detectors.build import build_detector
from kdcli.detectors.weights import export, load_detector, weights_sha256
from kdcli.errors import MissingPathError, OptionError
from kdcli.files import atomic_save

CLASSES = ClassList((Category(7, "cat"), Category(9, "dog")))
SPEC = ModelSpec("gfl", "shufflenet_v2_x0_5", 2, fpn_channels=32, tower_convs=1)


@pytest.fixture
def content() -> dict[str, Any]:
    torch.manual_seed(1)
    detector = build_detector(SPEC)
    detector(torch.rand(2, 3, 64, 64))  # moves the running statistics
    return export(detector, CLASSES, "256x320", {"epoch": 3, "optimiser": {"momentum": torch.ones(2)}})


def test_round_trip_is_bit_equal(content: dict[str, Any], tmp_path: Path) -> None:
    atomic_save(content, tmp_path / "a.pt")
    detector, meta = load_detector(tmp_path / "a.pt")
    assert not detector.training
    assert detector.spec == ModelSpec.from_json(content["model"])
    state = detector.state_dict()
    assert state.keys() == content["weights"].keys()
    assert all(torch.equal(state[k], v) for k, v in content["weights"].items())
    assert (meta.classes, meta.canvas, meta.extra["epoch"]) == (CLASSES, "256x320", 3)
    assert torch.equal(meta.extra["optimiser"]["momentum"], torch.ones(2))
    assert meta.weights_sha256 == weights_sha256(state) == content["weights_sha256"]
    again = export(detector, meta.classes, meta.canvas, meta.extra)
    assert again["weights_sha256"] == content["weights_sha256"]
    assert again["model"] == content["model"]


def test_outputs_are_equal_after_loading(tmp_path: Path) -> None:
    torch.manual_seed(2)
    detector = build_detector(SPEC).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = detector(images)
        atomic_save(export(detector, CLASSES, "64", {}), tmp_path / "a.pt")
        after = load_detector(tmp_path / "a.pt")[0](images)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_run_folder_means_its_last_weights(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run" / "weights").mkdir(parents=True)
    with pytest.raises(MissingPathError, match=r"run '.*': has no weights/last.pt"):
        load_detector(tmp_path / "run")
    atomic_save(content, tmp_path / "run" / "weights" / "last.pt")
    assert load_detector(str(tmp_path / "run"))[1].path == tmp_path / "run" / "weights" / "last.pt"
    with pytest.raises(MissingPathError, match=r"checkpoint '.*gone.pt': no such file"):
        load_detector(tmp_path / "gone.pt")


def test_bn_auto_and_channels_last_survive(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict(), path)
    detector = build_detector(SPEC, str(path))
    assert detector.spec.bn == "norm_eval"
    detector = detector.to(memory_format=torch.channels_last)
    atomic_save(export(detector, CLASSES, "64", {}), tmp_path / "a.pt")
    loaded, meta = load_detector(tmp_path / "a.pt")
    assert loaded.spec.bn == "norm_eval"
    assert {k for k, p in loaded.named_parameters() if p.requires_grad} == {
        k for k, p in detector.named_parameters() if p.requires_grad
    }
    assert meta.weights_sha256 == weights_sha256(detector.state_dict())
    assert not any(m.training for m in loaded.train().modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_loading_draws_no_random_numbers(content: dict[str, Any], tmp_path: Path) -> None:
    atomic_save(content, tmp_path / "a.pt")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_detector(tmp_path / "a.pt")
    assert torch.equal(torch.rand(3), expected)


def test_export_is_a_copy(content: dict[str, Any]) -> None:
    detector = build_detector(SPEC)
    saved = export(detector, CLASSES, "64", {})
    before = saved["weights"]["head.cls.weight"].clone()
    with torch.no_grad():
        detector.head.cls.weight.add_(1)  # type: ignore[union-attr,operator]
    assert torch.equal(saved["weights"]["head.cls.weight"], before)


def test_flipped_bit_of_a_tensor_is_an_error(content: dict[str, Any], tmp_path: Path) -> None:
    atomic_save(content, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    needle = content["weights"]["neck.p7.weight"].numpy().tobytes()
    data[data.index(needle) + 100] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(OptionError, match="corrupt, its weights do not match"):
        load_detector(tmp_path / "a.pt")


def _set(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.__setitem__(key, value)


def _rename_backbone(content: dict[str, Any]) -> None:
    content["model"].update(backbone="resnet19")
    del content["digest"]  # a file from before there was one is checked as far as its parts tell


def _drop_weight(content: dict[str, Any]) -> None:
    del content["weights"]["neck.p7.weight"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("format", "other"), "not a kdcli checkpoint"),
        (_set("version", 2), "version 2, this kdcli reads 1"),
        (_set("weights", [1]), "'weights' is missing or not a dict"),
        (lambda c: c.pop("classes"), "'classes' is missing"),
        (_set("classes", CLASSES.to_json()[:1]), "1 classes for 2 outputs"),
        (_set("classes", ["cat", "dog"]), "'classes' is not a list of ids and names"),
        (_set("canvas", "33"), "multiple of 32"),
        (_rename_backbone, "did you mean 'resnet18'"),
        (lambda c: c["model"].pop("num_classes"), "'num_classes' is missing"),
        (lambda c: c["model"].update(num_classes=3), "2 classes for 3 outputs"),
        (_drop_weight, "neck.p7.weight"),
        (lambda c: c["model"].update(tower_convs=2), "content does not match its digest"),
        (lambda c: c["classes"][0].update(name="cow"), "content does not match its digest"),
        (_set("canvas", "256x352"), "content does not match its digest"),
        (lambda c: c["extra"].update(ap=99.0), "content does not match its digest"),
        (lambda c: c["extra"]["optimiser"]["momentum"].add_(1), "content does not match its digest"),
        (_set("digesu", "0"), "has a field 'digesu'"),
        (lambda c: c["weights"].update({"neck.p7.weight": 1}), "not names and tensors"),
        (lambda c: c["weights"].update({"neck.p7.weight": c["weights"]["neck.p7.weight"].half()}), "is torch.float16"),
        (_set("classes", [{"id": 7.5, "name": "cat"}, {"id": 9, "name": "dog"}]), "not a list of ids and names"),
        (lambda c: c["weights"]["neck.p7.weight"].add_(1), "corrupt"),
    ],
)
def test_wrong_content_is_one_line(
    change: Callable[[dict[str, Any]], None], words: str, content: dict[str, Any], tmp_path: Path
) -> None:
    change(content)
    atomic_save(content, tmp_path / "a.pt")
    with pytest.raises(OptionError, match=words) as caught:
        load_detector(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    assert "a.pt" in str(caught.value)


def test_backbone_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "b.pth")
    with pytest.raises(OptionError, match="not a kdcli checkpoint"):
        load_detector(tmp_path / "b.pth")


def test_hash_sees_names_values_shapes_and_dtypes_but_not_layout_or_order() -> None:
    base = {"a": torch.arange(24.0).reshape(1, 2, 3, 4), "n": torch.tensor(3)}
    assert weights_sha256(base) == weights_sha256(dict(reversed(base.items())))
    assert weights_sha256(base) == weights_sha256({**base, "a": base["a"].to(memory_format=torch.channels_last)})
    others = [
        {**base, "b": torch.zeros(0)},
        {**base, "a": base["a"].reshape(2, 1, 3, 4)},
        {**base, "n": torch.tensor(3, dtype=torch.int32)},
        {**base, "a": base["a"] + torch.tensor([0, 0, 0, 1e-6])},
        {"b": base["a"], "n": base["n"]},
    ]
    assert len({weights_sha256(state) for state in (base, *others)}) == 6
    assert weights_sha256({"h": torch.ones(3, dtype=torch.bfloat16)}) != weights_sha256({"h": torch.ones(3).half()})
