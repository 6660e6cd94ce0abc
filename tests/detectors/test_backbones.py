"""Backbones against torchvision's own networks, their weight files, and what stays frozen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from kdcli.detectors.backbones import BACKBONES, Backbone, load_backbone_weights
from kdcli.detectors.base import BatchNormMode
from kdcli.engine.training.optim import make_optimizer
from kdcli.errors import MissingPathError, OptionError
from kdcli.options import OptimOptions
from tests.support.selection import matrix

CHANNELS = {
    "resnet18": (128, 256, 512),
    "resnet34": (128, 256, 512),
    "resnet50": (512, 1024, 2048),
    "resnet101": (512, 1024, 2048),
    "resnet152": (512, 1024, 2048),
    "resnext101_32x4d": (512, 1024, 2048),
    "resnext101_64x4d": (512, 1024, 2048),
    "mobilenet_v2": (32, 96, 1280),
    "mobilenet_v2_leaky": (32, 96, 320),
    "mobilenet_v3_small": (24, 48, 576),
    "mobilenet_v3_large": (40, 112, 960),
    "shufflenet_v2_x0_5": (48, 96, 192),
    "shufflenet_v2_x1_0": (116, 232, 464),
}


def _write_classifier(name: str, path: Path) -> nn.Module:
    """A torchvision classifier with random weights and batch statistics, whose state dict is in ``path``."""
    torch.manual_seed(3)
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    model(torch.randn(4, 3, 64, 64))  # so that the running statistics are not 0 and 1
    torch.save(model.state_dict(), path)
    return model.eval()


@pytest.mark.parametrize("name", matrix(BACKBONES, lambda name: "resne" not in name or name == "resnet18"))
def test_maps_have_strides_8_16_32_and_the_known_channels(name: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(name).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    assert backbone.channels == CHANNELS[name]
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, 64 // s, 96 // s) for c, s in zip(CHANNELS[name], (8, 16, 32), strict=True)
    ]


def test_probe_leaves_running_statistics_and_mode_alone() -> None:
    backbone = Backbone("resnet18")
    assert backbone.training
    assert all(m.training for m in backbone.modules())
    statistics = [
        (k, v) for k, v in backbone.state_dict().items() if k.endswith(("running_mean", "num_batches_tracked"))
    ]
    assert len(statistics) == 40
    assert all(not v.any() for _, v in statistics)


def test_resnet18_file_gives_torchvisions_own_maps(tmp_path: Path) -> None:
    model = _write_classifier("resnet18", tmp_path / "w.pth")
    backbone = Backbone("resnet18").eval()
    load_backbone_weights(backbone, str(tmp_path / "w.pth"))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        x: Tensor = model.maxpool(model.relu(model.bn1(model.conv1(images))))  # type: ignore[operator]
        c3 = model.layer2(model.layer1(x))  # type: ignore[operator]
        c4 = model.layer3(c3)  # type: ignore[operator]
        c5 = model.layer4(c4)  # type: ignore[operator]
        ours = backbone(images)
    for mine, theirs in zip(ours, (c3, c4, c5), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_map_completes_to_torchvisions_logits(name: str, tmp_path: Path) -> None:
    """C5 through the part that was cut off gives the classifier's own output."""
    model = _write_classifier(name, tmp_path / "w.pth")
    backbone = Backbone(name).eval()
    load_backbone_weights(backbone, str(tmp_path / "w.pth"))
    images = torch.randn(1, 3, 64, 64)
    # a MobileNet's C5 is its last convolution; ShuffleNet's is cut before it
    last = model.conv5 if name.startswith("shufflenet") else torch.nn.Identity()
    head = model.fc if name.startswith("shufflenet") else model.classifier
    with torch.no_grad():
        pooled = last(backbone(images)[2]).mean((2, 3))  # type: ignore[operator]
        torch.testing.assert_close(head(pooled), model(images))  # type: ignore[operator]


def test_file_without_the_classifier_loads(tmp_path: Path) -> None:
    model = torchvision.models.shufflenet_v2_x0_5(weights=None)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("conv5", "fc"))}
    torch.save(state, tmp_path / "w.pth")
    backbone = Backbone("shufflenet_v2_x0_5")
    load_backbone_weights(backbone, str(tmp_path / "w.pth"))
    assert torch.equal(backbone.state_dict()["stage4.0.branch1.0.weight"], state["stage4.0.branch1.0.weight"])


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.module."])
def test_file_of_a_training_loads(prefix: str, tmp_path: Path) -> None:
    state = {f"{prefix}{k}": v for k, v in torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict().items()}
    torch.save({"model": state, "epoch": 3, "best": np.float64(71.2)}, tmp_path / "w.pth")
    backbone = Backbone("shufflenet_v2_x0_5")
    load_backbone_weights(backbone, str(tmp_path / "w.pth"))
    assert torch.equal(backbone.state_dict()["conv1.0.weight"], state[f"{prefix}conv1.0.weight"])


def test_old_file_without_batch_counters_loads(tmp_path: Path) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path / "w.pth")
    backbone = Backbone("resnet18")
    load_backbone_weights(backbone, str(tmp_path / "w.pth"))
    assert torch.equal(backbone.state_dict()["layer2.0.conv1.weight"], state["layer2.0.conv1.weight"])


def _drop(state: dict[str, Tensor]) -> None:
    del state["layer2.0.conv1.weight"]


def _add(state: dict[str, Tensor]) -> None:
    state["layer9.weight"] = torch.zeros(1)


def _reshape(state: dict[str, Tensor]) -> None:
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop, r"1 missing \(layer2.0.conv1.weight\)"),
        (_add, r"1 unexpected \(layer9.weight\)"),
        (_reshape, r"1 of another shape \(conv1.weight\)"),
    ],
)
def test_wrong_keys_are_named(change: object, words: str, tmp_path: Path) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    assert callable(change)
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(OptionError, match=words):
        load_backbone_weights(Backbone("resnet18"), str(tmp_path / "w.pth"))


def test_file_of_another_backbone_or_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save(torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict(), tmp_path / "other.pth")
    with pytest.raises(OptionError, match=r"not those of resnet18: keys 100 missing \(.*, \.\.\.\)"):
        load_backbone_weights(Backbone("resnet18"), str(tmp_path / "other.pth"))
    torch.save({"model": {}}, tmp_path / "nested.pth")
    with pytest.raises(OptionError, match="not a torchvision state dict"):
        load_backbone_weights(Backbone("resnet18"), str(tmp_path / "nested.pth"))
    with pytest.raises(OptionError, match=r"not a torchvision state dict .*: it has 'model'"):
        load_backbone_weights(Backbone("resnet18"), str(tmp_path / "nested.pth"))
    (tmp_path / "junk.pth").write_bytes(b"junk" * 100)
    with pytest.raises(OptionError, match="not a PyTorch file"):
        load_backbone_weights(Backbone("resnet18"), str(tmp_path / "junk.pth"))
    with pytest.raises(MissingPathError, match="none, imagenet or the path"):
        load_backbone_weights(Backbone("resnet18"), "imagnet")


def test_imagenet_is_torchvisions_download_with_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    run_request: dict[str, object] = {}
    state: dict[str, Tensor] = torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict()

    def answer(url: str, **options: object) -> dict[str, Tensor]:
        run_request.update(options, url=url)
        return state

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", answer)
    backbone = Backbone("shufflenet_v2_x0_5")
    load_backbone_weights(backbone, "imagenet")
    assert run_request["url"] == torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url
    assert run_request["check_hash"] is True
    assert run_request["weights_only"] is True
    assert torch.equal(backbone.state_dict()["conv1.0.weight"], state["conv1.0.weight"])


@pytest.mark.parametrize("name", sorted(set(BACKBONES) - {"resnext101_32x4d"}))
def test_every_other_backbone_has_imagenet_weights(name: str) -> None:
    weights = torchvision.models.get_model_weights(name.removesuffix("_leaky"))["IMAGENET1K_V1"]
    assert weights.url.startswith("https://download.pytorch.org/")


def test_resnext101_32x4d_is_that_of_the_paper() -> None:
    """arXiv 1611.05431, table 1 for 50 layers: 32 groups of 4 channels in a stage's first 3x3 conv, doubled a stage."""
    with torch.device("meta"):
        backbone = Backbone("resnext101_32x4d")
    state = backbone.state_dict()
    assert [tuple(state[f"layer{k}.0.conv2.weight"].shape) for k in (1, 2, 3, 4)] == [
        (128 * 2**k, 4 * 2**k, 3, 3) for k in range(4)
    ]
    # of 44,177,704 with the classifier (timm's resnext101_32x4d), 2048 * 1000 + 1000 are its own
    assert sum(p.numel() for p in backbone.parameters()) == 44_177_704 - 2_049_000
    with pytest.raises(
        OptionError, match=r"'imagenet': torchvision has none of resnext101_32x4d; give the path .*https"
    ):
        load_backbone_weights(backbone, "imagenet")


def test_leaky_mobilenet_takes_mobilenets_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the classifier and the last convolution; where nothing is cut off above 6 or below 0 it computes
    what torchvision's does."""
    model = _write_classifier("mobilenet_v2", tmp_path / "w.pth")
    backbone = Backbone("mobilenet_v2_leaky").eval()
    load_backbone_weights(backbone, str(tmp_path / "w.pth"))
    state = model.state_dict()
    gone = {k for k in state if k.startswith(("features.18.", "classifier."))}
    assert set(backbone.state_dict()) == set(state) - gone
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())
    leaks = [m for m in backbone.modules() if isinstance(m, nn.LeakyReLU)]
    # 35 relu6 in the whole: the stem's, 1 + 16 * 2 of the blocks, the last convolution's
    assert len(leaks) == 34
    assert {m.negative_slope for m in leaks} == {0.1}
    assert not any(isinstance(m, nn.ReLU6) for m in backbone.modules())
    sequence = model.features
    assert isinstance(sequence, nn.Sequential)
    plain = sequence[:18]
    for part in plain.modules():
        for child, old in part.named_children():
            if isinstance(old, nn.ReLU6):
                setattr(part, child, nn.LeakyReLU(0.1))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(backbone(images)[2], plain(images))
    asked = []

    def answer(url: str, **options: object) -> dict[str, Tensor]:
        asked.append(url)
        return state

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", answer)
    load_backbone_weights(backbone, "imagenet")
    assert asked == [torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.url]


@pytest.mark.parametrize(
    ("failure", "error"),
    [(OSError("no network"), MissingPathError), (RuntimeError("invalid hash value"), OptionError)],
)
def test_failed_download_is_one_line(
    failure: Exception, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(url: str, **options: object) -> None:
        raise failure

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    with pytest.raises(error, match=r"'imagenet'.*https://download.pytorch.org/"):
        load_backbone_weights(Backbone("resnet18"), "imagenet")


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("resnet18", ("conv1.", "bn1.", "layer1.")),
        ("mobilenet_v2", tuple(f"features.{k}." for k in range(4))),
        ("shufflenet_v2_x0_5", ("conv1.",)),
    ],
)
def test_frozen_backbone_keeps_norms_and_stem(name: str, stem: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    backbone = Backbone(name, bn="frozen")
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone.train()
    assert backbone.training
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(m.training for m in norms)
    sum(m.sum() for m in backbone(torch.randn(2, 3, 64, 64))).backward()
    convs = {f"{n}.weight" for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d)}
    assert {k for k, p in backbone.named_parameters() if p.grad is not None} == {
        k for k in convs if not k.startswith(stem)
    }
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def resnet50_names(stages: dict[int, int]) -> tuple[set[str], set[str]]:
    """(convolutions, scales and shifts) of bottleneck stages, e.g. {2: 4} for the four blocks of layer2, as torchvision
    names them: three pairs a block, and one more where the first block's shortcut changes the shape."""
    convs, norms = set(), set()
    for stage, blocks in stages.items():
        for block in range(blocks):
            pairs = [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")]
            pairs += [("downsample.0", "downsample.1")] if block == 0 else []
            for conv, norm in pairs:
                convs.add(f"layer{stage}.{block}.{conv}.weight")
                norms |= {f"layer{stage}.{block}.{norm}.{kind}" for kind in ("weight", "bias")}
    return convs, norms


@pytest.mark.parametrize("bn", ["norm_eval", "frozen", "train"])
def test_which_parameters_of_a_resnet50_get_a_gradient(bn: BatchNormMode) -> None:
    """mmdet's frozen_stages=1, norm_eval=True; requires_grad of its norm_cfg is True for norm_eval, False for frozen."""
    torch.manual_seed(0)
    backbone = Backbone("resnet50", bn=bn).train()
    sum(m.square().mean() for m in backbone(torch.randn(2, 3, 64, 64))).backward()
    found = {k: p.numel() for k, p in backbone.named_parameters() if p.grad is not None}
    convs, norms = resnet50_names({2: 4, 3: 6, 4: 3})
    assert len(norms) == 2 * 42
    if bn == "norm_eval":
        assert set(found) == convs | norms
        # 2 * (4 * (128 + 128 + 512) + 512  +  6 * (256 + 256 + 1024) + 1024  +  3 * (512 + 512 + 2048) + 2048)
        assert sum(found[name] for name in norms) == 50_176
    elif bn == "frozen":
        assert set(found) == convs
    else:
        stem = {"conv1.weight", "bn1.weight", "bn1.bias"}
        assert set(found) == convs | norms | stem | set.union(*resnet50_names({1: 3}))
    assert set(found) == {k for k, p in backbone.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", matrix(BACKBONES, lambda name: "resne" not in name or name == "resnet18"))
def test_norm_eval_trains_scales_and_no_statistics(name: str) -> None:
    """Three steps of SGD with weight decay: what moves, and the first step of a scale by hand."""
    torch.manual_seed(0)
    backbone = Backbone(name, bn="norm_eval").train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    stem = {k for path in backbone._runs[0] for k in before if k.startswith(f"{path}.")}
    norms = {n for n, m in backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}
    statistics = {k for k in before if k.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert len(statistics) == 3 * len(norms)
    optimizer = make_optimizer(backbone, OptimOptions(lr=0.1, weight_decay=0.01), batch=16)
    scale = next(k for k in sorted(before) if k.rsplit(".", 1)[0] in norms and k.endswith(".weight") and k not in stem)
    for step in range(3):
        optimizer.zero_grad()
        sum(m.square().mean() for m in backbone(torch.randn(2, 3, 64, 64))).backward()
        if step == 0:
            gradient = backbone.get_parameter(scale).grad
            assert gradient is not None
            expected = before[scale] - 0.1 * (gradient + 0.01 * before[scale])  # decay on scales too, as mmdet's SGD
        optimizer.step()
        if step == 0:
            torch.testing.assert_close(backbone.get_parameter(scale).detach(), expected)
    after = backbone.state_dict()
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    assert moved == set(before) - stem - statistics
    assert not any(m.training for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))


def test_trained_backbone_moves_its_statistics() -> None:
    backbone = Backbone("shufflenet_v2_x0_5")
    backbone(torch.randn(2, 3, 64, 64))
    assert all(int(v) == 1 for k, v in backbone.state_dict().items() if k.endswith("num_batches_tracked"))
    assert all(p.requires_grad for p in backbone.parameters())


def test_leaky_mobilenet_trained_as_bckds_configuration_freezes_nothing() -> None:
    """mmdet's MobileNetV2 has norm_eval=False and frozen_stages=-1 where a configuration does not say."""
    backbone = Backbone("mobilenet_v2_leaky", bn="train").train()
    assert all(p.requires_grad for p in backbone.parameters())
    assert all(m.training for m in backbone.modules())


def test_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'resnet18'"):
        Backbone("resnet19")
