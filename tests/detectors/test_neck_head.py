"""Neck and head on their own: level sizes, channel order, initialisation, groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdcli.detectors.dense.head import DenseHead, group_count
from kdcli.detectors.neck import FPN, NeckSpec
from kdcli.geometry.grid import Grid
from kdcli.structures import Canvas
from kdcli.tensors import BOX_DISTRIBUTION, BOX_REGRESSION, CENTERNESS, CLS_LOGITS


@pytest.mark.parametrize("p6_from", ["p5", "c5"])
@pytest.mark.parametrize("canvas", [Canvas(64, 96), Canvas(160, 32), Canvas(256, 320)])
def test_levels_are_the_grids(p6_from: str, canvas: Canvas) -> None:
    neck = FPN((4, 6, 8), 16, NeckSpec(p6_from=p6_from))  # type: ignore[arg-type]
    maps = [
        torch.randn(2, c, canvas.height // s, canvas.width // s) for c, s in zip((4, 6, 8), (8, 16, 32), strict=True)
    ]
    outputs = neck(maps)
    assert [tuple(m.shape[-2:]) for m in outputs] == Grid().level_shapes(canvas)
    assert {m.shape[1] for m in outputs} == {16}


def test_p6_and_p7_follow_the_spec() -> None:
    maps = [torch.randn(1, c, 64 // s, 64 // s) for c, s in zip((4, 6, 8), (8, 16, 32), strict=True)]
    for spec in (NeckSpec("p5"), NeckSpec("p5", relu_before_p7=True), NeckSpec("c5")):
        neck = FPN((4, 6, 8), 16, spec)
        out = neck(maps)
        p6 = neck.p6(out[2] if spec.p6_from == "p5" else maps[2])
        assert torch.equal(out[3], p6)
        assert torch.equal(out[4], neck.p7(p6.relu() if spec.relu_before_p7 else p6))


def test_top_down_path_adds_the_coarser_level() -> None:
    neck = FPN((4, 6, 8), 16, NeckSpec())
    maps = [torch.randn(1, c, 64 // s, 64 // s) for c, s in zip((4, 6, 8), (8, 16, 32), strict=True)]
    inner5 = neck.lateral[2](maps[2])
    inner4 = neck.lateral[1](maps[1]) + inner5.repeat_interleave(2, -1).repeat_interleave(2, -2)
    inner3 = neck.lateral[0](maps[0]) + inner4.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(neck(maps)[0], neck.output[0](inner3))


def test_channel_order_and_level_factors() -> None:
    """Channel (a*4 + side)*E + bin, flattened by level, cell, anchor."""
    head = DenseHead(3, 3, 0, norm="none", num_anchors=2, num_classes=5, box_dims=(4, 17), scaled_levels=2)
    assert head.scales is not None
    head.scales.data = torch.tensor([1.0, 3.0])
    features = [torch.randn(1, 3, 4, 6), torch.randn(1, 3, 2, 3)]
    out = head(features)
    assert out[CLS_LOGITS].shape == (1, 2 * 30, 5)
    assert out[BOX_DISTRIBUTION].shape == (1, 2 * 30, 4, 17)
    raw = [head.box(x) for x in features]
    anchor, side, bin_, y, x = 1, 2, 11, 1, 2
    fine = (y * 6 + x) * 2 + anchor
    coarse = 48 + (y * 3 + x) * 2 + anchor
    channel = (anchor * 4 + side) * 17 + bin_
    assert out[BOX_DISTRIBUTION][0, fine, side, bin_] == raw[0][0, channel, y, x]
    assert out[BOX_DISTRIBUTION][0, coarse, side, bin_] == raw[1][0, channel, y, x] * 3
    assert out[CLS_LOGITS][0, coarse, 4] == head.cls(features[1])[0, anchor * 5 + 4, y, x]


def test_initialisation_is_mmdets() -> None:
    torch.manual_seed(0)
    head = DenseHead(64, 64, 2, norm="group", num_anchors=1, num_classes=20, box_dims=(4, 17), scaled_levels=5)
    assert head.cls.bias is not None
    torch.testing.assert_close(head.cls.bias.sigmoid(), torch.full((20,), 0.01))
    for conv in (m for m in head.modules() if isinstance(m, nn.Conv2d)):
        assert abs(conv.weight.std().item() - 0.01) < 5e-4
    towers = [m for m in head.cls_tower if isinstance(m, nn.Conv2d)]
    assert len(towers) == 2
    assert all(m.bias is None for m in towers)


def test_centerness_and_regression_outputs() -> None:
    head = DenseHead(8, 8, 1, norm="none", num_anchors=1, num_classes=2, box_dims=(4,), centerness="box")
    out = head([torch.randn(2, 8, 2, 2)])
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        CLS_LOGITS: (2, 4, 2),
        BOX_REGRESSION: (2, 4, 4),
        CENTERNESS: (2, 4, 1),
    }
    assert not any(isinstance(m, nn.GroupNorm) for m in head.modules())


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (64, 32), (32, 32)])
def test_32_groups_where_they_divide(channels: int, groups: int) -> None:
    assert group_count(channels) == groups


@pytest.mark.parametrize(("channels", "groups"), [(48, 24), (40, 20), (31, 31), (37, 1)])
def test_largest_divisor_says_so(channels: int, groups: int) -> None:
    with pytest.warns(UserWarning, match=f"{channels} channels: GroupNorm has {groups} groups"):
        assert group_count(channels) == groups


def test_bf16_gradients_are_right_on_maps_of_width_1() -> None:
    torch.manual_seed(0)
    neck = FPN((8, 16, 24), 32, NeckSpec())
    maps = [torch.randn(4, c, n, 2 * n // 2) for c, n in ((8, 8), (16, 4), (24, 2))]  # a canvas of 64x64: P6 is 1x1
    wanted, found = [], []
    for enabled, gradients in ((False, wanted), (True, found)):
        neck.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            levels = neck(maps)
        assert levels[3].shape[-1] == levels[4].shape[-1] == 1
        torch.stack([level.float().square().mean() for level in levels]).sum().backward()  # type: ignore[no-untyped-call]
        gradients += [conv.weight.grad.clone() for conv in (neck.p6, neck.p7) if conv.weight.grad is not None]
    for exact, ours in zip(wanted, found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0.1, atol=0.05 * float(exact.abs().max()))
