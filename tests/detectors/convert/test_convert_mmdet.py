"""A converted detector computes what mmdet's own model computes: same weights, same image, same outputs and detections.

What mmdet computed is recorded: see ``mmdet_case.py``.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.classes import Category, ClassList
from kdcli.detectors.base import IMAGE_MEAN, IMAGE_STD, Detector, ModelSpec
from kdcli.detectors.build import build_detector
from kdcli.detectors.convert.classes import class_list
from kdcli.detectors.convert.coco import COCO_CLASSES
from kdcli.detectors.convert.from_mmdet import Converted, convert_mmdet
from kdcli.detectors.convert.mmdet_style import STYLES
from kdcli.detectors.two_stage.detector import RPN_DELTAS, RPN_LOGITS, TwoStageDetector
from kdcli.detectors.weights import export, load_detector
from kdcli.errors import OptionError
from kdcli.files import atomic_save
from kdcli.structures import Canvas
from kdcli.tensors import CENTERNESS, CLS_LOGITS, Tensors, flatten_levels
from tests.support.mmdet_case import canvas_of, case, config_text, images_of, weights
from tests.support.selection import matrix

CLASSES = ClassList.numbered("123")
NAMES = {
    "gfl": "gfl_resnet18",
    "atss": "atss_resnet18",
    "retinanet_caffe": "retinanet_resnet50",
    "fcos_detectron": "fcos_resnet50",
    "fcos_normalised": "fcos_resnet18",
    "faster_rcnn": "mm_faster_rcnn_resnet18",
}


def converted(name: str, **options: Any) -> Converted:
    return convert_mmdet({"state_dict": weights(name), "meta": {"cfg": config_text(name)}}, **options)


def exact_outputs(detector: Detector, name: str) -> Tensors:
    """In float64, as recorded: GroupNorm blows up the rounding errors of nearly constant maps."""
    double = copy.deepcopy(detector).double()
    double.mean = torch.tensor(detector.spec.image_mean, dtype=torch.float64).reshape(3, 1, 1)
    double.std = torch.tensor(IMAGE_STD, dtype=torch.float64).reshape(3, 1, 1)
    with torch.no_grad():
        return double((images_of(name) * 255).round().double() / 255)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest."""
    assert found.shape == expected.shape
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    assert difference <= 1e-5 * largest


@pytest.mark.parametrize("name", matrix(NAMES, {"gfl", "faster_rcnn"}.__contains__))
def test_outputs_and_detections_are_mmdets(name: str) -> None:
    made, canvas = converted(name), canvas_of(name)
    detector, arrays = made.detector, {k: torch.from_numpy(v) for k, v in case(name).items() if v.dtype.kind in "fu"}
    with torch.no_grad():
        single = detector(images_of(name))
    outputs = exact_outputs(detector, name)
    assert not detector.training
    assert detector.spec.name == NAMES[name]
    assert made.style_source == "the config in the file"
    maps = {part: [arrays[f"{part}_l{k}"] for k in range(5)] for part in ("cls", "box")}
    if isinstance(detector, TwoStageDetector):
        assert_equal(outputs[RPN_LOGITS], flatten_levels(maps["cls"], (1,)))
        assert_equal(outputs[RPN_DELTAS], flatten_levels(maps["box"], (4,)))
        with torch.no_grad():
            logits, deltas = detector.roi_outputs(single, [arrays["rois"][:, 1:]], canvas)
        assert_equal(logits, arrays["roi_cls"])
        assert_equal(deltas.flatten(1), arrays["roi_box"])
    else:
        if detector.spec.detector == "fcos":  # mmdet's head gives pixels
            maps["box"] = [m / stride for m, stride in zip(maps["box"], detector.grid.strides, strict=True)]
        assert_equal(outputs[CLS_LOGITS], flatten_levels(maps["cls"], (3,)))
        dims = (4, detector.spec.reg_max + 1) if name == "gfl" else (4,)
        assert_equal(outputs[detector.box_name], flatten_levels(maps["box"], dims))
    assert (CENTERNESS in outputs) == ("centerness_l0" in arrays)
    if CENTERNESS in outputs:
        assert_equal(outputs[CENTERNESS], flatten_levels([arrays[f"centerness_l{k}"] for k in range(5)], (1,)))
    _compare_detections(made, single, canvas, arrays)


def _compare_detections(made: Converted, outputs: Tensors, canvas: Canvas, arrays: dict[str, Tensor]) -> None:
    count = len(outputs["features"])
    found = made.detector.decode(outputs, torch.tensor([canvas.size] * count), canvas)
    for k, ours in enumerate(found):
        boxes, scores = arrays[f"boxes_{k}"], arrays[f"scores_{k}"]
        assert len(ours.boxes) == len(boxes) > 30
        torch.testing.assert_close(ours.scores, scores, atol=1e-4, rtol=0)
        # nearly equal scores may change places: each of theirs is among ours
        labels = arrays[f"labels_{k}"].long()
        gap = (ours.boxes[None] - boxes[:, None]).abs().amax(dim=2) + 1e3 * (ours.labels[None] != labels[:, None])
        assert (gap.amin(dim=1) < 1e-2).sum() >= len(boxes) - 1  # the last of 100 may be another


@pytest.mark.parametrize("name", matrix(["gfl", "retinanet_caffe", "fcos_detectron", "faster_rcnn"]))
def test_checkpoint_reloads_by_itself(name: str, tmp_path: Path) -> None:
    made = converted(name).detector
    atomic_save(export(made, CLASSES, str(canvas_of(name)), {}), tmp_path / "teacher.pt")
    detector, _ = load_detector(tmp_path / "teacher.pt")
    assert detector.spec == made.spec
    with torch.no_grad():
        outputs, again = made(images_of(name)), detector(images_of(name))
    assert all(torch.equal(again[key], outputs[key]) for key in outputs)


def test_specs_are_seen_in_the_weights() -> None:
    found = {name: converted(name).detector.spec for name in NAMES}
    common = {"num_classes": 3, "fpn_channels": 64, "bn": "frozen"}
    assert found["gfl"] == ModelSpec("gfl", "resnet18", tower_convs=2, head_channels=32, reg_max=8, **common)
    assert found["fcos_detectron"] == ModelSpec(
        "fcos", "resnet50", tower_convs=2, head_channels=32, fcos="plain", stride_in_1x1=True,
        image_mean=STYLES["detectron"].image_mean, **common,
    )  # fmt: skip
    assert found["retinanet_caffe"].image_mean == IMAGE_MEAN
    assert found["retinanet_caffe"].stride_in_1x1
    assert found["fcos_normalised"].fcos == "normalised"
    assert found["faster_rcnn"] == ModelSpec("mm_faster_rcnn", "resnet18", head_channels=64, **common)


@pytest.mark.full
def test_style_without_a_config() -> None:
    """Flag first; merged batch norms say Caffe; other batch norms torchvision."""
    bare = weights("retinanet_caffe")
    merged = {k: torch.zeros_like(v) if k.endswith("running_mean") else v for k, v in bare.items()}
    assert convert_mmdet(bare).style == "pytorch"
    made = convert_mmdet(merged)
    assert (made.style, made.style_source) == ("caffe", "batch norms without statistics")
    assert made.detector.spec.stride_in_1x1
    plain = weights("fcos_detectron")
    merged = {k: torch.zeros_like(v) if k.endswith("running_mean") else v for k, v in plain.items()}
    assert convert_mmdet(merged).style == "detectron"
    assert convert_mmdet(merged, fcos="normalised").style == "caffe"
    assert convert_mmdet(merged, style="pytorch").style_source == "--style"
    with pytest.raises(OptionError, match="--style 'cafe': unknown; did you mean 'caffe'"):
        convert_mmdet(bare, style="cafe")
    two = config_text("gfl") + config_text("retinanet_caffe")
    with pytest.raises(OptionError, match="2 means, 2 stds, 2 values of to_rgb, 2 of style; say which with --style"):
        convert_mmdet({"state_dict": weights("gfl"), "meta": {"config": two}})


def test_own_normalisation_is_read_from_the_config() -> None:
    """Images in 0..1 without a mean: the same outputs as with the weights scaled by hand."""
    text = "data_preprocessor=dict(mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0], bgr_to_rgb=False)"
    made = convert_mmdet({"state_dict": weights("gfl"), "meta": {"cfg": text}})
    assert made.style == "own"
    assert made.detector.spec.image_mean == (0.0, 0.0, 0.0)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    conv = made.detector.get_submodule("backbone.conv1")
    with torch.no_grad():
        found = conv(images / torch.tensor(IMAGE_STD).reshape(3, 1, 1))
        weight = weights("gfl")["backbone.conv1.weight"]
        expected = torch.nn.functional.conv2d(images.flip(1), weight, stride=2, padding=3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_fcos_variant() -> None:
    bare = weights("fcos_normalised")
    assert convert_mmdet(bare).detector.spec.fcos == "normalised"  # by the bias of its convs
    unbiased = {k: v for k, v in bare.items() if "_convs." not in k or not k.endswith("conv.bias") or "neck" in k}
    assert len(unbiased) == len(bare) - 4
    assert convert_mmdet(unbiased).detector.spec.fcos == "plain"
    detector = convert_mmdet(unbiased, fcos="normalised").detector
    assert not detector.get_parameter("head.cls_tower.0.bias").any()
    with pytest.raises(OptionError, match=r"fcos_resnet18 do not fit: too many: head\.box_tower\.0\.bias, .*tower"):
        convert_mmdet(bare, fcos="plain")
    with pytest.raises(OptionError, match="one of norm_on_bbox and centerness_on_reg, kdcli's FCOS both or neither"):
        convert_mmdet({"state_dict": bare, "meta": {"cfg": "norm_on_bbox=True"}})
    with pytest.raises(OptionError, match=r"model\.fcos = 'plain': the file holds a gfl; leave it out"):
        convert_mmdet(weights("gfl"), fcos="plain")


def test_old_files() -> None:
    """No batch counters, FCOS's first names of its convs, and GFL's constant buffer or none."""
    bare = weights("fcos_detectron")
    old = {k.replace(".conv_", ".fcos_"): v for k, v in bare.items() if not k.endswith("num_batches_tracked")}
    ours, theirs = (convert_mmdet(s).detector.state_dict() for s in (old, bare))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    constant = {**weights("gfl"), "bbox_head.integral.project": torch.arange(9)}
    assert convert_mmdet(constant).detector.spec.reg_max == 8


def test_prefixes() -> None:
    """The student of a distillation file, by itself or by name."""
    small, large = weights("gfl"), weights("atss")
    both = {**small, **{f"teacher_model.{k}": v for k, v in large.items()}}
    made = convert_mmdet(both)
    assert (made.detector.spec.detector, made.left_out) == ("gfl", ("teacher_model.",))
    made = convert_mmdet(both, prefix="teacher_model")
    assert made.detector.spec.detector == "atss"
    named = {f"student.{k}": v for k, v in small.items()} | {f"teacher.{k}": v for k, v in large.items()}
    assert convert_mmdet(named).detector.spec.detector == "gfl"
    assert convert_mmdet(named, prefix="teacher.").left_out == ("student.",)
    unclear = {k.replace("student.", "a."): v for k, v in named.items()}
    with pytest.raises(OptionError, match=r"several detectors \('a\.', 'teacher\.'\); choose one with --prefix"):
        convert_mmdet(unclear)
    with pytest.raises(OptionError, match=r"--prefix 'b': no detector of that prefix; the file has 'a\.', 'teacher\.'"):
        convert_mmdet(unclear, prefix="b")


def test_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    converted("gfl")
    assert torch.equal(torch.get_rng_state(), before)


def test_foreign_weights_are_refused() -> None:
    bare = weights("gfl")

    def refused(state: object, message: str) -> None:
        with pytest.raises(OptionError, match=message):
            convert_mmdet(state)

    refused([1], "holds no dictionary")
    refused({"state_dict": {"a": 1}}, "no 'state_dict' of tensors")
    refused({"fc.weight": torch.zeros(2, 2)}, r"no 'backbone\.conv1\.weight'")
    masks = {f"bbox_head.mask.{k}.weight": torch.zeros(1) for k in range(7)}
    refused(bare | masks, r"no place for: bbox_head\.mask\.0\.weight, .*\.4\.weight and 2 more; only plain models")
    refused(bare | {"backbone.conv_deep.weight": torch.zeros(1)}, r"too many: backbone\.conv_deep\.weight")
    lost = {k: v for k, v in bare.items() if not k.startswith("neck.fpn_convs.4")}
    refused(lost, r"gfl_resnet18 do not fit: missing: neck\.p7\.bias, neck\.p7\.weight")
    headless = {k: v for k, v in bare.items() if not k.startswith("bbox_head.gfl_cls")}
    refused(headless, r"not a GFL, ATSS, FCOS, RetinaNet or Faster R-CNN of mmdet: its head has bbox_head\.cls_convs")
    cut = {k: v for k, v in bare.items() if not k.startswith("backbone.layer3.1")}
    refused(cut, r"the backbone has 2-2-1-2 blocks of 1 group\(s\), not those of resnet18")
    reg = weights("retinanet_caffe")
    wide = reg["bbox_head.retina_reg.weight"].repeat(17, 1, 1, 1)
    refused(reg | {"bbox_head.retina_reg.weight": wide}, "27 class and 612 box outputs a cell, mmdet's retinanet 9 x")
    anchors = {"state_dict": bare, "meta": {"cfg": "anchor_generator=dict(octave_base_scale=4)"}}
    refused(anchors, "has octave_base_scale=4, kdcli's gfl 8")
    short = bare | {"neck.lateral_convs.1.conv.weight": torch.zeros(64, 3, 1, 1)}
    refused(short, r"of another shape: neck\.lateral\.1\.weight")


def test_spec_fields_of_converted_weights() -> None:
    spec = ModelSpec("gfl", "resnet18", 3, bn="train", image_mean=(0.1, 0.2, 0.3))
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    for mean in ((0.1, 0.2), (0.1, 0.2, 103.5), (1, 0, 0)):
        with pytest.raises(OptionError, match=r"model\.image_mean = .*three numbers in 0\.\.1"):
            ModelSpec("gfl", "resnet18", 3, image_mean=mean)
    with pytest.raises(OptionError, match="stride_in_1x1: backbone resnet18 has no bottlenecks"):
        build_detector(ModelSpec("gfl", "resnet18", 3, bn="train", stride_in_1x1=True))
    with pytest.raises(OptionError, match=r"stride_in_1x1 = 'yes': must be true or false"):
        ModelSpec("gfl", "resnet50", 3, stride_in_1x1="yes")  # type: ignore[arg-type]


def test_class_names_come_from_the_file() -> None:
    bare = weights("gfl")
    for meta in ({"CLASSES": ("a", "b", "c")}, {"dataset_meta": {"classes": ["a", "b", "c"]}}):
        assert convert_mmdet({"state_dict": bare, "meta": meta}).names == ["a", "b", "c"]
    assert convert_mmdet({"state_dict": bare, "meta": {"dataset_meta": {"CLASSES": "a"}}}).names == ["a"]
    assert convert_mmdet({"state_dict": bare, "meta": {}}).names is None


def test_class_list() -> None:
    given = ClassList((Category(4, "a"), Category(9, "b")))
    assert class_list(2, ["b", "a"], given, "--data D") == (Category(9, "b"), Category(4, "a"))
    assert class_list(2, None, given, "--data D") == given
    assert class_list(2, ["x", "y"], None, "") == (Category(1, "x"), Category(2, "y"))
    assert class_list(80, COCO_CLASSES.names, None, "") == COCO_CLASSES
    for arguments, message in (
        ((3, ["a", "b"], given, "--data D"), "the file names 2 classes for 3 outputs"),
        ((3, None, given, "--data D"), "--data D: 2 classes, the model has 3"),
        ((2, None, None, ""), "does not name its 2 classes; give them with --classes coco or --data D"),
        ((2, ["a", "c"], given, "--data D"), "--data D: has no class 'c', which the file names"),
        ((2, ["a", "a"], None, ""), "names a class twice"),
    ):
        with pytest.raises(OptionError, match=message):
            class_list(*arguments)
