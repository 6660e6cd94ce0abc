"""Whole detectors: shapes of every combination, gradients, decoding, frozen parts, independence of images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdcli.detectors.backbones import BACKBONES
from kdcli.detectors.base import BatchNormMode, ModelSpec, count_parameters
from kdcli.detectors.build import DETECTORS, NAMES, build_detector, model_names, parse_model_name
from kdcli.detectors.dense.detector import DenseDetector
from kdcli.detectors.dense.recipes import GFL, RETINANET, Recipe
from kdcli.errors import OptionError
from kdcli.geometry.assign import assign
from kdcli.structures import Canvas, Targets
from kdcli.tensors import BACKBONE, BOX_DISTRIBUTION, BOX_REGRESSION, CENTERNESS, CLS_LOGITS, FEATURES
from tests.support.selection import matrix

DENSE = [name for name, recipe in DETECTORS.items() if isinstance(recipe, Recipe)]
CANVAS = Canvas(64, 96)
CELLS = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1 * 1


def small(detector: str, backbone: str = "shufflenet_v2_x0_5", **options: object) -> DenseDetector:
    """A small detector of 3 classes with reproducible weights."""
    torch.manual_seed(0)
    values: dict[str, object] = {"num_classes": 3, "fpn_channels": 32, "tower_convs": 1, **options}
    built = build_detector(ModelSpec(detector=detector, backbone=backbone, **values))  # type: ignore[arg-type]
    assert isinstance(built, DenseDetector)
    return built


def make_targets(detector: DenseDetector, canvas: Canvas, boxes: list[Tensor]) -> Targets:
    """Targets whose content fills the canvas; labels count up."""
    return Targets(
        boxes=boxes,
        labels=[torch.arange(len(b)) % detector.spec.num_classes for b in boxes],
        content=torch.tensor([canvas.size] * len(boxes)),
        canvas=canvas,
        assigned=torch.stack([assign(detector.assigner, detector.grid, canvas, b, canvas.size) for b in boxes]),
        valid=torch.stack([detector.grid.valid(canvas, canvas.size) for _ in boxes]),
    )


@pytest.mark.parametrize(
    "name",
    matrix(
        [f"gfl_{backbone}" for backbone in BACKBONES] + [f"{name}_shufflenet_v2_x0_5" for name in DENSE],
        lambda name: "_resne" not in name or name == "gfl_resnet18",
    ),
)
def test_shapes_are_what_specs_promise(name: str) -> None:
    detector = small(*parse_model_name(name)).eval()
    with torch.no_grad():
        outputs = detector(torch.rand(1, 3, *CANVAS.size))
    anchors = detector.grid.num_anchors
    assert detector.grid.num_cells(CANVAS) == CELLS
    assert detector.spec.name == name
    rows = {"cell": CELLS, "anchor": CELLS * anchors, "level0": 8 * 12, "level1": 4 * 6, "level2": 2 * 3}
    assert {k: tuple(v.shape) for k, v in outputs.items()} == {
        k: (1, rows[s.per], *s.dims) for k, s in detector.specs().items()
    }
    box = (BOX_DISTRIBUTION, (4, 17)) if name.startswith("gfl") else (BOX_REGRESSION, (4,))
    centerness = {CENTERNESS} if name.startswith(("atss", "fcos")) else set()
    assert set(outputs) == {FEATURES, CLS_LOGITS, box[0], *centerness, *BACKBONE[1:]}
    assert detector.specs()[box[0]].dims == box[1]


@pytest.mark.parametrize("name", DENSE)
def test_scores_start_at_the_prior(name: str) -> None:
    scores = small(name)(torch.rand(2, 3, *CANVAS.size))[CLS_LOGITS].sigmoid()
    assert 0.005 < scores.median() < 0.02


@pytest.mark.parametrize("name", DENSE)
def test_gradient_reaches_every_trainable_parameter(name: str) -> None:
    detector = small(name)
    canvas = Canvas(128, 160)
    boxes = [
        torch.tensor([[8.0, 8, 24, 26], [30, 20, 70, 66], [60, 10, 150, 120], [0, 0, 160, 128]]),
        torch.empty(0, 4),
    ]
    outputs = detector(torch.rand(2, 3, *canvas.size))
    losses = detector.loss(outputs, make_targets(detector, canvas, boxes))
    assert all(v.ndim == 0 and torch.isfinite(v) and v > 0 for v in losses.values())
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(p.requires_grad for p in detector.parameters())
    for key, parameter in detector.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", DENSE)
def test_images_without_boxes_give_every_parameter_a_gradient(name: str) -> None:
    detector = small(name)
    losses = detector.loss(
        detector(torch.rand(1, 3, *CANVAS.size)), make_targets(detector, CANVAS, [torch.empty(0, 4)])
    )
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for key, parameter in detector.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", DENSE)
def test_boxes_of_single_anchors_are_the_dense_ones(name: str) -> None:
    detector = small(name)
    total = CELLS * detector.grid.num_anchors
    rows = torch.randn(2, total, *detector.box_dims, requires_grad=True)
    dense = detector.dense_boxes({detector.box_name: rows}, CANVAS)
    assert dense.shape == (2, total, 4)
    for index in (0, 17, total // 2, total - 1):
        one = detector.decode_boxes(rows[1, index][None], torch.tensor([index]), CANVAS)
        assert torch.equal(one[0], dense[1, index])
    (gradient,) = torch.autograd.grad(dense.sum(), rows)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


def test_distribution_decodes_to_known_edges() -> None:
    """Edge logits that put all mass on bins 1, 2, 3, 4 reach 1..4 strides from the cell's centre."""
    detector = small("gfl")
    rows = torch.full((1, 4, 17), -1e4)
    for side in range(4):
        rows[0, side, side + 1] = 1e4
    index = 8 * 12 + 6 + 2  # level of stride 16, row 1, column 2
    box = detector.decode_boxes(rows, torch.tensor([index]), CANVAS)
    assert box.tolist() == [[32 - 16, 16 - 32, 32 + 48, 16 + 64]]


def test_zero_deltas_are_the_anchors() -> None:
    detector = small("retinanet")
    index = torch.arange(0, CELLS * 9, 7)
    boxes = detector.decode_boxes(torch.zeros(len(index), 4), index, CANVAS)
    torch.testing.assert_close(boxes, detector.grid.anchors(CANVAS, torch.float32)[index])


@pytest.mark.parametrize("name", DENSE)
def test_boxes_ignore_autocast(name: str) -> None:
    detector = small(name)
    rows = torch.randn(50, *detector.box_dims)
    index = torch.arange(50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = detector.decode_boxes(rows, index, CANVAS)
    assert torch.equal(inside, detector.decode_boxes(rows, index, CANVAS))


@pytest.mark.parametrize("name", DENSE)
def test_decode_finds_what_the_outputs_say(name: str) -> None:
    detector = small(name)
    total = CELLS * detector.grid.num_anchors
    logits = torch.full((2, total, 3), -9.0)
    logits[1, 40 * detector.grid.num_anchors, 2] = 2.0
    outputs = {CLS_LOGITS: logits, detector.box_name: torch.ones(2, total, *detector.box_dims)}
    empty, found = detector.decode(outputs, torch.tensor([CANVAS.size] * 2), CANVAS)
    assert len(empty.boxes) == 0
    assert found.labels.tolist() == [2]
    torch.testing.assert_close(found.scores, torch.tensor([2.0]).sigmoid())
    box = detector.dense_boxes(outputs, CANVAS)[1, 40 * detector.grid.num_anchors]
    limit = torch.tensor([96.0, 64, 96, 64])
    torch.testing.assert_close(found.boxes[0], box.clamp(min=0).minimum(limit))


@pytest.mark.parametrize("name", DENSE)
def test_images_of_a_batch_do_not_influence_each_other(name: str) -> None:
    detector = small(name).eval()
    a, b, c = torch.rand(3, 3, *CANVAS.size)
    with torch.no_grad():
        alone = detector(torch.stack([a, b]))
        swapped = detector(torch.stack([c, a]))
    for key in alone:
        torch.testing.assert_close(alone[key][0], swapped[key][1], atol=1e-5, rtol=0)


def test_inputs_are_normalised_inside() -> None:
    detector = small("gfl").eval()
    seen: list[Tensor] = []
    detector.backbone.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    detector(torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1).expand(1, 3, 32, 32))
    assert seen[0].abs().max() < 1e-6
    assert not any(k in detector.state_dict() for k in ("mean", "std"))


def test_frozen_detector_survives_train_and_a_step() -> None:
    detector = small("gfl", bn="frozen")
    detector.train()
    before = {k: v.clone() for k, v in detector.backbone.state_dict().items()}
    losses = detector.loss(
        detector(torch.rand(2, 3, *CANVAS.size)),
        make_targets(detector, CANVAS, [torch.tensor([[8.0, 8, 40, 40]])] * 2),
    )
    sum(losses.values()).backward()  # type: ignore[union-attr]
    torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=1e3).step()
    after = detector.backbone.state_dict()
    norms = {n for n, m in detector.backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}
    fixed = {k for k in after if k.rsplit(".", 1)[0] in norms or k.startswith("conv1.")}
    assert all(torch.equal(after[k], before[k]) for k in fixed)
    assert not torch.equal(after["stage4.0.branch1.2.weight"], before["stage4.0.branch1.2.weight"])
    assert 0 < count_parameters(detector, trainable=True) < count_parameters(detector)


@pytest.mark.parametrize("bn", ["norm_eval", "frozen"])
def test_batch_norms_outside_the_backbone_are_trained(bn: BatchNormMode) -> None:
    """torchvision's Faster R-CNN v2 has some in its neck and RoI head: model.bn is of the backbone alone."""
    spec = ModelSpec("tv_faster_rcnn_v2", "shufflenet_v2_x0_5", 3, fpn_channels=32, head_channels=32, bn=bn)
    detector = build_detector(spec).train()
    norms = {n: m for n, m in detector.named_modules() if isinstance(m, nn.BatchNorm2d)}
    outside = {n: m for n, m in norms.items() if not n.startswith("backbone.")}
    assert len([n for n in outside if n.startswith("neck.")]) == 8  # two for each of four levels
    assert len([n for n in outside if n.startswith("roi.")]) == 4
    assert all(m.training and m.weight.requires_grad for m in outside.values())
    assert not any(m.training for n, m in norms.items() if n not in outside)


def test_bn_auto_becomes_train_without_weights() -> None:
    assert small("gfl").spec.bn == "train"
    assert small("gfl", bn="frozen").spec.bn == "frozen"


def test_students_can_be_small() -> None:
    detector = small("gfl", fpn_channels=64, tower_convs=2, num_classes=20)
    assert count_parameters(detector) < 0.9e6
    assert count_parameters(detector.head) < count_parameters(small("gfl", fpn_channels=64, head_channels=128).head)
    assert count_parameters(small("gfl", fpn_channels=32, tower_convs=0)) < 0.3e6


@pytest.mark.parametrize("name", DENSE)
def test_batches_of_both_orientations_have_the_same_rows(name: str) -> None:
    detector = small(name).eval()
    with torch.no_grad():
        wide = detector(torch.rand(1, 3, *CANVAS.size))
        high = detector(torch.rand(1, 3, *CANVAS.transposed.size))
    assert {k: v.shape for k, v in wide.items()} == {k: v.shape for k, v in high.items()}


def test_recipes_hold_mmdets_numbers() -> None:
    gfl, retinanet = GFL, RETINANET
    assert (gfl.grid.num_anchors, retinanet.grid.num_anchors) == (1, 9)
    assert (gfl.nms_iou, retinanet.nms_iou) == (0.6, 0.5)
    assert gfl.grid.anchors(CANVAS)[0].tolist() == [-32, -32, 32, 32]
    torch.testing.assert_close(retinanet.grid.anchors(CANVAS)[3], torch.tensor([-16.0, -16, 16, 16]).double())
    assert (gfl.neck.p6_from, retinanet.neck.p6_from) == ("p5", "c5")


def test_model_names() -> None:
    assert len(model_names()) == len(set(model_names())) == len(NAMES) * len(BACKBONES)
    assert parse_model_name("tv_retinanet_v2_resnet50") == ("tv_retinanet_v2", "resnet50")
    assert parse_model_name("faster_rcnn_resnet18") == ("faster_rcnn", "resnet18")
    assert parse_model_name("gfl_mobilenet_v3_small") == ("gfl", "mobilenet_v3_small")
    with pytest.raises(OptionError, match="did you mean 'gfl_resnet18'"):
        parse_model_name("gfl_resnet81")
    for wrong in ("gfl", "gfl_", "resnet18", "retinanet_gfl_resnet18"):
        with pytest.raises(OptionError, match=f"model '{wrong}': unknown"):
            parse_model_name(wrong)
    with pytest.raises(OptionError, match="detector 'glf': unknown; did you mean 'gfl'"):
        build_detector(ModelSpec(detector="glf", backbone="resnet18", num_classes=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 0}, "model.num_classes = 0"),
        ({"fpn_channels": "64"}, "model.fpn_channels = '64'"),
        ({"tower_convs": -1}, "model.tower_convs = -1"),
        ({"head_channels": 0}, "model.head_channels = 0"),
        ({"reg_max": True}, "model.reg_max = True"),
        ({"bn": "frosen"}, "model.bn = 'frosen'; did you mean 'frozen'"),
        ({"box": "distributions"}, "model.box = 'distributions'; did you mean 'distribution'"),
        ({"fcos": "plane"}, "model.fcos = 'plane'; did you mean 'plain'"),
        ({"fcos": "plain"}, "model.fcos = 'plain': the model is gfl"),
        ({"backbone": ["x"]}, "model.backbone = .*must be a name"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], words: str) -> None:
    values: dict[str, object] = {"detector": "gfl", "backbone": "resnet18", "num_classes": 3, **options}
    with pytest.raises(OptionError, match=words):
        ModelSpec(**values)  # type: ignore[arg-type]


def test_spec_json_round_trip() -> None:
    spec = ModelSpec("gfl", "resnet18", 3, fpn_channels=64, head_channels=32, bn="frozen")
    assert ModelSpec.from_json(spec.to_json()) == spec
    with pytest.raises(OptionError, match=r"fpn_chanels.*did you mean 'fpn_channels'"):
        ModelSpec.from_json({**spec.to_json(), "fpn_chanels": 1})


def test_spec_of_an_older_version_takes_the_defaults() -> None:
    spec = ModelSpec("retinanet", "resnet18", 3, tower_convs=2)
    old = {k: v for k, v in spec.to_json().items() if k not in ("box", "fcos")}
    assert ModelSpec.from_json(old) == spec
    with pytest.raises(OptionError, match="'num_classes' is missing"):
        ModelSpec.from_json({k: v for k, v in old.items() if k != "num_classes"})
