"""Backbone and FPN of detectors whose head kdcli does not have: what is read, what is assumed, what is refused.

That the numbers are mmdet's follows from the detectors that are read whole, whose outputs are recorded; against mmdet 3.3.0's
ResNet and FPN themselves, with and without a relu before P7, both kinds of neck agreed in every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcli.detectors.base import ModelSpec
from kdcli.detectors.build import build_detector, family_of, model_names, parse_model_name
from kdcli.detectors.convert.from_mmdet import convert_mmdet
from kdcli.detectors.convert.from_mmdet_features import ConvertedFeatures, convert_mmdet_features
from kdcli.detectors.features import FeaturesDetector
from kdcli.errors import OptionError
from kdcli.structures import Canvas
from tests.support.mmdet_case import config_text, weights
from tests.support.mmdet_features import cascade_mask, deformable, gflv2, reppoints

IMAGES = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(3))
FPN = "neck=dict(type='FPN', num_outs=5, start_level=1"


def features(state: dict[str, Tensor], config: str = "", **options: Any) -> ConvertedFeatures:
    return convert_mmdet_features({"state_dict": state, "meta": {"cfg": config}}, **{"classes": 3, **options})


@pytest.mark.parametrize(
    ("make", "name", "neck", "strides"),
    [
        (cascade_mask, "faster_rcnn", "pool", (4, 8, 16, 32, 64)),
        (gflv2, "gfl", "on_output", (8, 16, 32, 64, 128)),
        (reppoints, "retinanet_caffe", "on_input", (8, 16, 32, 64, 128)),
    ],
)
def test_maps_are_those_of_the_whole_detector(
    make: Callable[[], dict[str, Tensor]], name: str, neck: str, strides: tuple[int, ...]
) -> None:
    made = features(make(), config_text(name))
    whole = convert_mmdet({"state_dict": weights(name), "meta": {"cfg": config_text(name)}}).detector
    detector = made.detector
    assert isinstance(detector, FeaturesDetector)
    assert detector.spec == replace(
        ModelSpec("mm_features", whole.spec.backbone, 3, 64, bn="frozen", neck=neck),  # type: ignore[arg-type]
        image_mean=whole.spec.image_mean,
        stride_in_1x1=whole.spec.stride_in_1x1,
    )
    assert detector.grid.strides == whole.grid.strides == strides
    with torch.no_grad():
        ours, theirs = detector(IMAGES), whole(IMAGES)
    assert ours.keys() == detector.specs().keys() == {k for k in theirs if k.startswith(("features", "backbone/"))}
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
        assert detector.specs()[key] == whole.specs()[key]
        assert value.shape[2] == detector.specs()[key].dims[0]


def test_what_is_left_out_and_assumed_is_said() -> None:
    made = features(cascade_mask())
    assert made.left_out == ("roi_head.", "rpn_head.")
    assert made.neck == "strides 4 to 64, P6 pooled (assumed, from 4 lateral convs)"
    assert features(cascade_mask(), "num_outs=5").neck == "strides 4 to 64, P6 pooled (the config in the file)"
    student = {f"student.{k}": v for k, v in gflv2().items()}
    teacher = {f"teacher.{k}": v for k, v in reppoints().items()}
    made = features({**student, **teacher}, prefix="teacher")
    assert (made.detector.spec.backbone, made.left_out) == ("resnet50", ("bbox_head.", "student."))
    assert made.neck == ("strides 8 to 128, P6 of C5 (assumed, from the channels of fpn_convs.3), P7 of P6 (assumed)")


@pytest.mark.parametrize(
    ("said", "neck", "relu"),
    [
        ("add_extra_convs='on_output'", "on_output", False),
        ('"add_extra_convs": "on_output", "relu_before_extra_convs": True', "on_output_relu", True),
        ("add_extra_convs=True, extra_convs_on_inputs=False, relu_before_extra_convs=True", "on_output_relu", True),
        ("add_extra_convs=True, extra_convs_on_inputs=False, relu_before_extra_convs=False", "on_output", False),
    ],
)
def test_the_config_says_what_p6_and_p7_read(said: str, neck: str, relu: bool) -> None:
    made = features(gflv2(), f"{FPN}, {said})")
    assert made.detector.spec.neck == neck
    p7 = "relu(P6)" if relu else "P6"
    assert made.neck == (f"strides 8 to 128, P6 of P5 (the config in the file), P7 of {p7} (the config in the file)")
    with torch.no_grad():
        _, _, _, p6, p7_map = made.detector.grid.level_maps(made.detector(IMAGES)["features"], Canvas(96, 128))
        conv = made.detector.get_submodule("neck.p7")
        torch.testing.assert_close(conv(F.relu(p6) if relu else p6), p7_map)


def test_add_extra_convs_true_reads_c5() -> None:
    made = features(reppoints(), f"{FPN}, add_extra_convs=True)")
    assert made.detector.spec.neck == "on_input"
    assert features(reppoints(), neck="on_input_relu").detector.spec.neck == "on_input_relu"


@pytest.mark.parametrize(("outputs", "dcn"), [(18, "v1"), (27, "v2")])
def test_deformable_convolutions_are_taken(outputs: int, dcn: str) -> None:
    state = deformable(reppoints(), outputs)
    made = features(state).detector
    assert made.spec.dcn == dcn
    old = {k.replace("conv2.conv_offset.", "conv2_offset."): v for k, v in state.items()}
    assert len(set(old) - set(state)) == 2 * 13
    assert features(old).detector.spec == made.spec
    whole = convert_mmdet(deformable(weights("retinanet_caffe"), outputs)).detector
    assert whole.spec.dcn == dcn
    with torch.no_grad():
        assert torch.equal(made(IMAGES)["features"], whole(IMAGES)["features"])


def resnext(groups: int) -> dict[str, Tensor]:
    """An X101's backbone, without numbers, and the neck of a Cascade R-CNN."""
    with torch.device("meta"):
        spec = ModelSpec("mm_features", f"resnext101_{groups}x4d", 3, 64, bn="frozen", neck="pool", dcn="v1")
        state = build_detector(spec).state_dict()
    names = {"neck.inner_blocks": "neck.lateral_convs", "neck.layer_blocks": "neck.fpn_convs"}
    made = {}
    for key, value in state.items():
        for ours, theirs in names.items():
            if key.startswith(ours):
                key = key.replace(ours, theirs).replace(".0.weight", ".conv.weight").replace(".0.bias", ".conv.bias")
        made[key] = torch.zeros(value.shape, dtype=value.dtype)
    return made


@pytest.mark.parametrize("groups", [32, 64])
def test_drkds_teacher_is_recognised(groups: int) -> None:
    """Cascade Mask R-CNN X101-32x4d-DCN; the first 3x3 conv tells it from 64x4d."""
    state = resnext(groups)
    assert tuple(state["backbone.layer1.0.conv2.weight"].shape) == (4 * groups, 4, 3, 3)
    spec = features(state).detector.spec
    assert (spec.backbone, spec.dcn, spec.neck) == (f"resnext101_{groups}x4d", "v1", "pool")


def _with(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {**state, **{name: torch.zeros(1) for name in names}}


def _without(state: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith(start)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: _with({}, "backbone.patch_embed.projection.weight"), "no 'backbone.conv1.weight'.* a Swin transformer"),
        (lambda: _with({}, "backbone.stem.0.weight"), "those of a ResNet with a deep stem"),
        (lambda: _with({}, "backbone.stem.0.weight", "backbone.layer1.0.convs.0.weight"), "those of a Res2Net"),
        (lambda: _with(gflv2(), "backbone.stage2.0.branches.0.0.conv1.weight"), "those of an HRNet; kdcli takes plain"),
        (lambda: _with(gflv2(), "neck.pafpn_convs.0.conv.weight"), "those of a PAFPN"),
        (lambda: _with(gflv2(), "neck.fpn_convs.0.gn.weight"), "those of an FPN with norms"),
        (lambda: _with(gflv2(), "neck.convs.0.weight"), r"no place for: neck\.convs\.0\.weight"),
        (lambda: _with(gflv2(), "backbone.layer1.0.context_block.weight"), r"too many: backbone\.layer1\.0\.context_block"),
        (lambda: _without(gflv2(), "neck.fpn_convs.4"), "3 lateral and 4 output convs; kdcli takes an FPN with 4 and 4"),
        (lambda: deformable(reppoints(), 36), r"have 36 offsets a cell, not 18 \(DCN\) or 27 \(DCNv2\)"),
        (lambda: _without(deformable(reppoints(), 27), "backbone.layer2.0.conv2.conv_offset"),
         r"missing: backbone\.layer2\.0\.conv2\.conv_offset\.bias"),
    ],
)  # fmt: skip
def test_what_kdcli_has_not_is_refused_by_name(state: Callable[[], dict[str, Tensor]], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        features(state())


@pytest.mark.parametrize(
    ("make", "config", "options", "message"),
    [
        (gflv2, "add_extra_convs='on_lateral'", {}, "add_extra_convs=on_lateral; kdcli has on_input and on_output"),
        (gflv2, "add_extra_convs='on_input'", {}, r"says on_input, the channels of fpn_convs\.3 on_output"),
        (gflv2, "num_outs=6", {}, "has num_outs=6; kdcli's necks have 5 levels"),
        (gflv2, "relu_before_extra_convs=True, relu_before_extra_convs=False", {}, "both values of relu_before"),
        (gflv2, "", {"neck": "pool"}, "'pool': the neck has convs for P6 and P7"),
        (cascade_mask, "", {"neck": "on_input"}, "'on_input': the neck has 4 lateral convs and a pooled P6"),
        (gflv2, "", {"classes": None}, "does not name its classes; give them with --classes coco or --data D"),
    ],
)  # fmt: skip
def test_a_neck_that_is_another_is_refused(
    make: Callable[[], dict[str, Tensor]], config: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        features(make(), config, **options)


def test_equal_channels_ask_for_the_neck() -> None:
    """512 channels in C5 of a ResNet-18 and in the neck."""
    state = gflv2()
    for key, value in list(state.items()):
        if key.startswith("neck."):
            shape = [
                512 if n == 64 and not (i == 1 and ".lateral_convs." in key) else n for i, n in enumerate(value.shape)
            ]
            state[key] = torch.zeros(shape)
    with pytest.raises(OptionError, match=r"as many channels; say which with --set model\.neck=on_input or on_output"):
        features(state)
    assert features(state, neck="on_input").detector.spec.neck == "on_input"


def test_it_has_no_head_and_cannot_be_trained() -> None:
    detector = features(gflv2()).detector
    canvas = Canvas(96, 128)
    for call in (
        lambda: detector.decode({}, torch.zeros(1, 2), canvas),
        lambda: detector.loss({}, None),  # type: ignore[arg-type]
        lambda: detector.box_name,
        lambda: detector.dense_boxes({}, canvas),
        lambda: parse_model_name("mm_features_resnet18"),
    ):
        with pytest.raises(OptionError, match="gives features only: it has no head to train or to detect with"):
            call()
    assert not any("mm_features" in name for name in model_names())
    assert family_of("mm_features") == "mm_features"


def test_the_neck_belongs_to_it_alone() -> None:
    with pytest.raises(OptionError, match=r"model\.neck = 'pool': the model is gfl; it is of mm_features alone"):
        ModelSpec("gfl", "resnet18", 3, neck="pool")
    with pytest.raises(OptionError, match=r"model\.neck = 'default': the model is mm_features; name another one"):
        ModelSpec("mm_features", "resnet18", 3)
    with pytest.raises(OptionError, match=r"model\.neck = 'pools'; did you mean 'pool'"):
        ModelSpec("mm_features", "resnet18", 3, neck="pools")  # type: ignore[arg-type]
