"""Weights that are none: refused wherever they are read, by the name of the first tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from kdcli.classes import Category, ClassList
from kdcli.cli.main import run
from kdcli.detectors.backbones import Backbone, load_backbone_weights
from kdcli.detectors.base import ModelSpec
from kdcli.detectors.build import build_detector, build_to_fill
from kdcli.detectors.convert.file import convert_file
from kdcli.detectors.soundness import require_sound, zero_kernels
from kdcli.detectors.weights import export, load_detector
from kdcli.errors import OptionError
from kdcli.files import atomic_save
from tests.support.mmdet_case import config_text, weights
from tests.support.selection import matrix

SPEC = ModelSpec("gfl", "shufflenet_v2_x0_5", 2, fpn_channels=32, tower_convs=1)
CLASSES = ClassList((Category(7, "cat"), Category(9, "dog")))


def _one(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[0] = value
        return changed

    return change


KERNELS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "nan": (_one(float("nan")), "holds NaN; its training diverged, or the file is damaged"),
    "inf": (_one(float("-inf")), "holds an infinite number"),
    "half nan": (lambda v: _one(float("nan"))(v.half()), "holds NaN"),
    "fp8 nan": (lambda v: _one(float("nan"))(v).to(torch.float8_e4m3fn), "holds NaN"),
    "sparse": (lambda v: v.flatten(1).to_sparse(), "is a sparse tensor"),
    "csr": (lambda v: v.flatten(1).to_sparse_csr(), "is a sparse tensor"),
    "meta": (lambda v: v.to("meta"), "is a tensor without data"),
    "complex": (lambda v: v.to(torch.complex64), "is complex"),
    "expanded": (
        lambda _: torch.ones(1).expand(10**6, 3, 7, 10**6),
        "is a tensor of .* elements, of which the file holds fewer",
    ),
    "quantised": (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), "is quantised"),
    "codes": (lambda v: v.to(torch.int8), "is of torch.int8"),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's, on kinds of tensors that are new or on their way out
@pytest.mark.parametrize("kind", matrix(sorted(KERNELS), quick=lambda kind: kind in ("nan", "codes")))
def test_a_kernel_that_is_none(kind: str, tmp_path: Path) -> None:
    change, words = KERNELS[kind]
    state = dict(weights("gfl"))
    mmdet, torch_vision = tmp_path / "mmdet.pth", tmp_path / "backbone.pth"
    key = "backbone.conv1.weight"
    torch.save({"state_dict": {**state, key: change(state[key])}, "meta": {"CLASSES": ("a", "b", "c")}}, mmdet)
    with pytest.raises(OptionError, match=rf"'.*conv1\.weight' {words}" if kind != "codes" else words) as caught:
        convert_file(mmdet, "mmdet", "64x96")
    assert str(mmdet) in str(caught.value)
    backbone = Backbone("shufflenet_v2_x0_5")
    own = torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict()
    torch.save({**own, "conv1.0.weight": change(own["conv1.0.weight"])}, torch_vision)
    with pytest.raises(OptionError, match=words):
        load_backbone_weights(backbone, str(torch_vision))


def test_a_variance_below_zero_and_other_shapes_are_refused(tmp_path: Path) -> None:
    state, file = dict(weights("gfl")), tmp_path / "a.pth"
    variance = state["backbone.bn1.running_var"].clone()
    variance[3] = -0.5
    wrong: dict[str, tuple[str, Tensor, str]] = {
        "variance": ("backbone.bn1.running_var", variance, "'backbone.bn1.running_var' holds a variance of -0.5"),
        "scalar": ("backbone.conv1.weight", torch.tensor(1.0), r"has the shape \(\): it reads no colour images"),
        "block": ("backbone.layer1.0.conv2.weight", torch.tensor(1.0), "do not fit: of another shape"),
        "lateral": ("neck.lateral_convs.0.conv.weight", torch.ones(9), r"has the shape \(9,\): not a plain model"),
        "scale": ("bbox_head.scales.0.scale", torch.ones(2), "no place for: bbox_head.scales.0.scale"),
        "wide": ("neck.lateral_convs.0.conv.weight", torch.ones(4000, 1, 1, 1), "too few for a gfl_resnet18 of"),
        "long": ("bbox_head.cls_convs." + "9" * 5000 + ".conv.weight", torch.ones(2), "a name of 5032 characters"),
        "number": ("bbox_head.cls_convs." + "9" * 300 + ".conv.weight", torch.ones(2), "too many: head.cls_tower"),
    }
    for key, value, words in wrong.values():
        torch.save({"state_dict": {**state, key: value}, "meta": {"CLASSES": ("a", "b", "c")}}, file)
        with pytest.raises(OptionError, match=words):
            convert_file(file, "mmdet", "64x96")


def test_checkpoints_of_ours(tmp_path: Path) -> None:
    """As a run that diverged writes them, all checksums right."""
    file = tmp_path / "a.pt"
    for key, value, words in (
        ("head.cls.weight", float("nan"), "'head.cls.weight' holds NaN"),
        ("head.scales", float("inf"), "'head.scales' holds an infinite number"),
        ("backbone.conv1.1.running_var", -1.0, "holds a variance of -1"),
    ):
        detector = build_detector(SPEC)
        detector.state_dict()[key].view(-1)[0] = value
        atomic_save(export(detector, CLASSES, "64", {}), file)
        with pytest.raises(OptionError, match=words):
            load_detector(file)
    content = export(build_detector(SPEC), CLASSES, "64", {})
    changed = {**content["weights"], "head.cls.weight": content["weights"]["head.cls.weight"].to(torch.complex64)}
    atomic_save({**content, "weights": changed}, file)
    with pytest.raises(OptionError, match=r"a\.pt': 'head\.cls\.weight' is complex"):
        load_detector(file)


@pytest.mark.parametrize(
    ("field", "value"), [("fpn_channels", 4_000), ("tower_convs", 60), ("num_classes", 60_000), ("reg_max", 1_000)]
)
def test_numbers_that_its_weights_cannot_fill(field: str, value: int) -> None:
    given = {"w": torch.empty(10**6)}
    with pytest.raises(OptionError, match=rf"its weights are 1000000 numbers, too few for .*{field} = {value}"):
        build_to_fill(replace(SPEC, **{field: value}), given)  # type: ignore[arg-type]


def test_a_wide_detector_is_not_refused(tmp_path: Path) -> None:
    """Beyond ORDINARY its size is compared, and fits."""
    spec = ModelSpec("gfl", "shufflenet_v2_x0_5", 2, fpn_channels=32, tower_convs=17)
    atomic_save(export(build_detector(spec), CLASSES, "64", {}), tmp_path / "a.pt")
    assert load_detector(tmp_path / "a.pt")[0].spec.tower_convs == 17


def test_zero_layers_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {**weights("gfl"), "bbox_head.gfl_cls.weight": torch.zeros_like(weights("gfl")["bbox_head.gfl_cls.weight"])}
    meta = {"cfg": config_text("gfl"), "CLASSES": ("a", "b", "c")}
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "a.pth")
    out = ["--out", str(tmp_path / "a.pt"), "--json"]
    assert run(["convert", str(tmp_path / "a.pth"), "--from", "mmdet", *out]) == 0
    assert json.loads(capsys.readouterr().out)["all_zero"] == "head.cls.weight"
    assert zero_kernels(weights("gfl")) == []


def test_sound_weights_pass() -> None:
    shared = torch.randn(4, 4)
    require_sound({"a": shared, "b": shared, "c": shared.T, "e": torch.empty(0, 3), "n": torch.tensor(3)}, "w")
    require_sound({"zero": torch.zeros(3, 3), "half": torch.ones(2, 2).half(), "p": torch.nn.Parameter(shared)}, "w")
