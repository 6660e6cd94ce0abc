"""Deformable convolutions against an implementation by grid_sample, their start, and the backbones that have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli.detectors.backbones import Backbone, load_backbone_weights
from kdcli.detectors.base import Dcn, ModelSpec
from kdcli.detectors.build import build_detector
from kdcli.detectors.deformable import DeformableConv
from kdcli.errors import OptionError


def by_grid_sample(x: Tensor, weight: Tensor, found: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    """The paper's equation, point by point of the kernel. ``found``: what conv_offset gives, y and x of a point in turn,
    then (v2) the masks: mmcv cuts 27 channels into thirds and joins the first two, which is the first 18, and its kernel
    reads channel 2k as y and 2k + 1 as x of point k."""
    batch, channels, height, width = x.shape
    rows, columns = found.shape[2:]
    out = torch.zeros(batch, len(weight), rows, columns, dtype=x.dtype)
    for k in range(9):
        y = torch.arange(rows, dtype=x.dtype)[:, None] * stride - padding + k // 3 + found[:, 2 * k]
        across = torch.arange(columns, dtype=x.dtype) * stride - padding + k % 3 + found[:, 2 * k + 1]
        grid = torch.stack([2 * across / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
        sampled = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
        if found.shape[1] == 27:
            sampled = sampled * found[:, 18 + k : 19 + k].sigmoid()
        parts = sampled.reshape(batch, groups, channels // groups, rows, columns)
        kernel = weight[:, :, k // 3, k % 3].reshape(groups, -1, channels // groups)
        out += torch.einsum("bgchw,goc->bgohw", parts, kernel).reshape(out.shape)
    return out


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("stride", [1, 2])
def test_is_the_papers_equation(version: Dcn, stride: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 128, 3, stride, 1, groups=32, bias=False)
    layer = DeformableConv(conv, version).double()
    nn.init.normal_(layer.conv_offset.weight, std=0.05)
    nn.init.normal_(layer.conv_offset.bias, std=1.5)  # type: ignore[arg-type]
    x = torch.randn(2, 64, 13, 18, dtype=torch.float64)
    with torch.no_grad():
        found = layer.conv_offset(x)
    assert found.shape[1] == {"v1": 18, "v2": 27}[version]
    assert float(found[:, :18].abs().max()) > 3  # also from outside the map
    expected = by_grid_sample(x, layer.weight, found, stride, 1, 32)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_starts_as_the_convolution_or_half_of_it() -> None:
    """Offsets 0; the sigmoid of a mask of 0 is 0.5: mmcv's DCNv2 halves what it replaces."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, 2, 1, bias=False)
    x = torch.randn(2, 8, 9, 12)
    torch.testing.assert_close(DeformableConv(conv, "v1")(x), conv(x))
    torch.testing.assert_close(DeformableConv(conv, "v2")(x), conv(x) / 2)


def test_computes_in_float32_under_autocast() -> None:
    layer = DeformableConv(nn.Conv2d(4, 4, 3, 1, 1, bias=False), "v2")
    x = torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert layer(x.bfloat16()).dtype == torch.float32
    assert torch.equal(out, layer(x))


@pytest.mark.parametrize(("name", "stages"), [("resnet50", (4, 6, 3)), ("resnext101_32x4d", (4, 23, 3))])
def test_names_and_shapes_are_mmdets(name: str, stages: tuple[int, ...]) -> None:
    with torch.device("meta"):
        plain, deformable = Backbone(name).state_dict(), Backbone(name, dcn="v2").state_dict()
    new = set(deformable) - set(plain)
    blocks = {f"layer{k}.{n}.conv2" for k, count in zip((2, 3, 4), stages, strict=True) for n in range(count)}
    assert new == {f"{block}.conv_offset.{kind}" for block in blocks for kind in ("weight", "bias")}
    assert all(deformable[k].shape == plain[k].shape for k in plain)
    inside = deformable["layer3.0.conv2.weight"].shape[0]
    assert deformable["layer3.0.conv2.conv_offset.weight"].shape == (27, inside, 3, 3)


def test_takes_a_classifiers_file_and_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    backbone = Backbone("resnet50", bn="norm_eval", dcn="v1")
    load_backbone_weights(backbone, str(tmp_path / "w.pth"))
    plain = Backbone("resnet50", bn="norm_eval")
    load_backbone_weights(plain, str(tmp_path / "w.pth"))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(backbone(images), plain(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    backbone(images)[2].square().mean().backward()
    gradient = backbone.get_parameter("layer2.0.conv2.conv_offset.weight").grad
    assert gradient is not None
    assert bool(gradient.abs().sum() > 0)


def test_stride_of_caffes_bottlenecks_stays_in_the_first_conv() -> None:
    with torch.device("meta"):
        backbone = Backbone("resnet50", stride_in_1x1=True, dcn="v1")
    layer = backbone.get_submodule("layer2.0.conv2")
    assert isinstance(layer, DeformableConv)
    assert layer.stride == 1


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_without_bottlenecks_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=rf"model.dcn = 'v1': backbone {name} has no bottlenecks; leave it out"):
        Backbone(name, dcn="v1")
    with pytest.raises(OptionError, match=r"model.dcn = 'v3'"):
        ModelSpec("gfl", name, 3, dcn="v3")  # type: ignore[arg-type]


@pytest.mark.parametrize("detector", ["gfl", "faster_rcnn"])
def test_detectors_have_it_by_their_spec(detector: str) -> None:
    with torch.device("meta"):
        made = build_detector(ModelSpec(detector, "resnet50", 3, dcn="v2"))
        assert "backbone.layer4.2.conv2.conv_offset.bias" in made.state_dict()
        assert made(torch.zeros(1, 3, 64, 64))["features"].shape[2] == 256
