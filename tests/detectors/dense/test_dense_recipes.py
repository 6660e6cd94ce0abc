"""Every recipe in every form: numbers, coding, gradients, and what model.box and model.fcos change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdcli.detectors.base import ModelSpec
from kdcli.detectors.build import DETECTORS, build_detector, recipe_of
from kdcli.detectors.dense.detector import DenseDetector
from kdcli.detectors.dense.head import DenseHead
from kdcli.detectors.dense.recipes import ATSS, FCOS, FCOS_PLAIN, GFL, RETINANET, with_distribution
from kdcli.engine.training.setup import make_student
from kdcli.errors import OptionError
from kdcli.geometry.assign import assign
from kdcli.geometry.boxes import encode_deltas, encode_distances
from kdcli.options import TrainOptions, build
from kdcli.structures import Canvas, Targets
from kdcli.tensors import BACKBONE, BOX_DISTRIBUTION, BOX_REGRESSION, CENTERNESS, CLS_LOGITS
from tests.support.selection import matrix

CANVAS = Canvas(128, 160)
BOXES = torch.tensor([[8.0, 8, 24, 26], [30, 20, 70, 66], [60, 10, 150, 120], [0, 0, 160, 128]])
FORMS: dict[str, dict[str, str]] = {
    "gfl": {"detector": "gfl"},
    "retinanet": {"detector": "retinanet"},
    "retinanet distribution": {"detector": "retinanet", "box": "distribution"},
    "atss": {"detector": "atss"},
    "atss distribution": {"detector": "atss", "box": "distribution"},
    "fcos": {"detector": "fcos"},
    "fcos distribution": {"detector": "fcos", "box": "distribution"},
    "fcos plain": {"detector": "fcos", "fcos": "plain"},
    "fcos plain distribution": {"detector": "fcos", "fcos": "plain", "box": "distribution"},
}


def small(form: str, **options: object) -> DenseDetector:
    """A small detector of 3 classes; 64 channels, since a group of one channel would cancel a conv's bias."""
    torch.manual_seed(0)
    values: dict[str, object] = {"num_classes": 3, "fpn_channels": 64, "tower_convs": 1, **FORMS[form], **options}
    built = build_detector(ModelSpec(backbone="shufflenet_v2_x0_5", **values))  # type: ignore[arg-type]
    assert isinstance(built, DenseDetector)
    return built


def targets_of(detector: DenseDetector, canvas: Canvas, boxes: list[Tensor]) -> Targets:
    """Targets whose content fills the canvas."""
    return Targets(
        boxes=boxes,
        labels=[torch.arange(len(b)) % 3 for b in boxes],
        content=torch.tensor([canvas.size] * len(boxes)),
        canvas=canvas,
        assigned=torch.stack([assign(detector.assigner, detector.grid, canvas, b, canvas.size) for b in boxes]),
        valid=torch.stack([detector.grid.valid(canvas, canvas.size) for _ in boxes]),
    )


def many_boxes(canvas: Canvas, count: int) -> Tensor:
    """Random boxes on the canvas, of at least 1 px."""
    limit = torch.tensor([canvas.width, canvas.height])
    a, b = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(count)) * (limit - 1)
    return torch.cat([torch.minimum(a, b), torch.maximum(a, b) + 1], dim=1)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_reaches_every_parameter(form: str) -> None:
    detector = small(form)
    outputs = detector(torch.rand(2, 3, *CANVAS.size))
    losses = detector.loss(outputs, targets_of(detector, CANVAS, [BOXES, torch.empty(0, 4)]))
    assert all(v.ndim == 0 and torch.isfinite(v) and v > 0 for v in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    for key, parameter in detector.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("canvas", matrix([Canvas(32, 32), Canvas(32, 64), Canvas(320, 416)]))
def test_losses_and_detections_on_any_canvas(form: str, canvas: Canvas) -> None:
    detector = small(form)
    boxes = [many_boxes(canvas, 300), torch.empty(0, 4), many_boxes(canvas, 1)]
    outputs = detector(torch.rand(3, 3, *canvas.size))
    losses = detector.loss(outputs, targets_of(detector, canvas, boxes))
    assert all(torch.isfinite(v) for v in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in detector.parameters())
    found = detector.decode(outputs, torch.tensor([canvas.size] * 3), canvas)
    assert all(len(d.boxes) <= 100 for d in found)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_boxes_has_a_graph(form: str) -> None:
    detector = small(form)
    losses = detector.loss(
        detector(torch.rand(1, 3, 64, 96)), targets_of(detector, Canvas(64, 96), [torch.empty(0, 4)])
    )
    assert all(float(v.detach()) == 0 for k, v in losses.items() if k != "loss_cls")
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in detector.parameters())


def encode(detector: DenseDetector, index: Tensor, boxes: Tensor) -> Tensor:
    """Rows of the box tensor that say ``boxes`` at the anchors ``index``; edges between two bins share the mass."""
    if detector.recipe.box == "delta":
        anchors = detector.grid.anchors(CANVAS, torch.float32)[index]
        return encode_deltas(anchors, boxes, detector.recipe.box_stds)
    centers = detector.grid.centers(CANVAS, torch.float32)[index // detector.grid.num_anchors]
    distances = encode_distances(centers, boxes) / detector.grid.anchor_strides(CANVAS, torch.float32)[index, None]
    if detector.recipe.box == "distance":
        return distances
    low = distances.floor().clamp(0, detector.spec.reg_max - 1)
    share = torch.zeros(*distances.shape, detector.spec.reg_max + 1)
    share.scatter_(-1, low.long()[..., None], (1 - (distances - low))[..., None])
    share.scatter_(-1, low.long()[..., None] + 1, (distances - low)[..., None])
    return (share + 1e-30).log()


@pytest.mark.parametrize("form", FORMS)
def test_decoding_gives_the_boxes_that_were_encoded(form: str) -> None:
    detector = small(form)
    assigned = assign(detector.assigner, detector.grid, CANVAS, BOXES, CANVAS.size)
    index = torch.nonzero(assigned >= 0)[:, 0]
    truth = BOXES[assigned[index].long()]
    centers = detector.grid.centers(CANVAS, torch.float32)[index // detector.grid.num_anchors]
    inside = encode_distances(centers, truth).amin(dim=1) >= 0  # distances cannot be negative
    index, truth = index[inside], truth[inside]
    assert set(assigned[index].tolist()) >= {1, 2, 3}
    decoded = detector.decode_boxes(encode(detector, index, truth), index, CANVAS)
    assert float((decoded - truth).abs().max()) < 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_perfect_outputs_are_decoded_to_the_ground_truth(form: str) -> None:
    detector = small(form)
    boxes = BOXES[1:3]
    assigned = assign(detector.assigner, detector.grid, CANVAS, boxes, CANVAS.size)
    total = detector.grid.num_total(CANVAS)
    logits = torch.full((1, total, 3), -9.0)
    rows = torch.zeros(1, total, *detector.box_dims)
    for box in range(2):
        index = torch.nonzero(assigned == box)[:, 0]
        logits[0, index, box] = 3.0
        rows[0, index] = encode(detector, index, boxes[box].expand(len(index), 4))
    outputs = {CLS_LOGITS: logits, detector.box_name: rows}
    if detector.recipe.centerness:
        outputs[CENTERNESS] = torch.full((1, total, 1), 1.0)
    (found,) = detector.decode(outputs, torch.tensor([CANVAS.size]), CANVAS)
    order = found.labels.argsort()
    assert found.labels[order].tolist() == [0, 1]
    torch.testing.assert_close(found.boxes[order], boxes, atol=1e-3, rtol=0)
    factor = torch.tensor(1.0).sigmoid() if detector.recipe.centerness else torch.tensor(1.0)
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 3.0]).sigmoid() * factor)


@pytest.mark.parametrize("form", FORMS)
def test_the_box_tensor_follows_the_form(form: str) -> None:
    detector = small(form, reg_max=7)
    distribution = form == "gfl" or form.endswith("distribution")
    name, dims = (BOX_DISTRIBUTION, (4, 8)) if distribution else (BOX_REGRESSION, (4,))
    with torch.no_grad():
        outputs = detector.eval()(torch.rand(1, 3, *CANVAS.size))
    assert {BOX_DISTRIBUTION, BOX_REGRESSION} & set(outputs) == {name}
    assert detector.box_name == name
    assert detector.specs()[name].dims == outputs[name].shape[2:] == dims


def test_with_distribution_changes_the_box_branch_alone() -> None:
    assert with_distribution(GFL) == GFL
    for recipe in (RETINANET, ATSS, FCOS, FCOS_PLAIN):
        derived = with_distribution(recipe)
        assert (derived.box, derived.activation) == ("distribution", "none")
        for field in ("name", "grid", "assigner", "loss", "norm", "neck", "nms_iou", "regions", "scaled", "centerness"):
            assert getattr(derived, field) == getattr(recipe, field), field
    assert recipe_of(ModelSpec("gfl", "resnet18", 3, box="distribution")) == GFL


@pytest.mark.parametrize("form", ["gfl", "atss", "atss distribution", "fcos", "retinanet distribution"])
def test_ciou_takes_the_place_of_giou(form: str) -> None:
    detector, other = small(form).eval(), small(form, box_loss="ciou").eval()
    outputs, targets = detector(torch.rand(1, 3, *CANVAS.size)), targets_of(detector, CANVAS, [BOXES])
    terms, changed = detector.loss(outputs, targets), other.loss(outputs, targets)
    assert {name for name in terms if not torch.equal(terms[name], changed[name])} == {"loss_bbox"}
    assert changed["loss_bbox"] > terms["loss_bbox"] * 0.5
    assert ModelSpec.from_json(other.spec.to_json()) == other.spec


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"detector": "retinanet"}, "the box loss of retinanet is no GIoU"),
        ({"detector": "fcos", "fcos": "plain"}, "the box loss of fcos is no GIoU"),
        ({"detector": "fcos", "fcos": "plain", "box": "distribution"}, "the box loss of fcos is no GIoU"),
        ({"detector": "faster_rcnn"}, "faster_rcnn_resnet18 has no dense box branch"),
    ],
)
def test_ciou_where_there_is_no_giou(form: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=f"model.box_loss = 'ciou': {message}"):
        build_detector(ModelSpec(backbone="resnet18", num_classes=3, box_loss="ciou", **form))


def test_names_do_not_change_with_the_form() -> None:
    assert recipe_of(ModelSpec("fcos", "resnet18", 3)) is DETECTORS["fcos"] is FCOS
    spec = ModelSpec("fcos", "resnet18", 3, fcos="plain", box="distribution")
    assert spec.name == "fcos_resnet18"
    assert recipe_of(spec) == with_distribution(FCOS_PLAIN)
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_recipes_hold_mmdets_numbers() -> None:
    assert (ATSS.grid, ATSS.assigner, ATSS.nms_iou, ATSS.neck) == (GFL.grid, GFL.assigner, 0.6, GFL.neck)
    assert ATSS.box_stds == (0.1, 0.1, 0.2, 0.2)
    assert (ATSS.centerness, ATSS.scaled, ATSS.norm) == ("box", True, "group")
    assert FCOS.grid.centers(CANVAS)[0].tolist() == [4.0, 4.0]
    assert (FCOS.assigner.center_radius, FCOS_PLAIN.assigner.center_radius) == (1.5, 0.0)
    assert (FCOS.nms_iou, FCOS_PLAIN.nms_iou) == (0.6, 0.5)
    assert (FCOS.centerness, FCOS_PLAIN.centerness) == ("box", "cls")
    for recipe in (FCOS, FCOS_PLAIN):
        assert recipe.neck.p6_from == "p5"
        assert recipe.neck.relu_before_p7


def head_of(recipe_head: str) -> DenseHead:
    return small(recipe_head).head


def test_fcos_heads_predict_strides() -> None:
    """At the start of training mmdet's plain head says about 1 px on every level, its normalised one about 0."""
    plain = small("fcos plain")
    plain.head.box.weight.data.zero_()
    rows = plain.eval()(torch.rand(1, 3, *CANVAS.size))[BOX_REGRESSION]
    torch.testing.assert_close(rows[0, :, 0], 1 / plain.grid.anchor_strides(CANVAS, torch.float32))
    normalised = small("fcos").eval()
    assert normalised.head.box.bias is not None
    with torch.no_grad():
        rows = normalised(torch.rand(1, 3, *CANVAS.size))[BOX_REGRESSION]
        assert (rows >= 0).all()
        normalised.head.box.bias.fill_(3.0)
        assert normalised.head.scales is not None
        normalised.head.scales[1] = 2.0
        normalised.head.box.weight.zero_()
        levels = normalised(torch.rand(1, 3, *CANVAS.size))[BOX_REGRESSION].split(
            normalised.grid.level_sizes(CANVAS), 1
        )
    assert [float(level.unique()) for level in levels] == [3.0, 6.0, 3.0, 3.0, 3.0]


def test_centerness_comes_from_its_tower() -> None:
    for form, ours, other in (("fcos", "box_tower", "cls_tower"), ("fcos plain", "cls_tower", "box_tower")):
        head = head_of(form)
        x = [torch.randn(1, 64, 4, 4)]
        head(x * 5)[CENTERNESS].sum().backward()
        assert all(p.grad is not None for p in head.get_submodule(ours).parameters())
        assert all(p.grad is None for p in head.get_submodule(other).parameters())


def test_distances_are_float32_under_autocast() -> None:
    detector = small("fcos plain").eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert detector(torch.rand(1, 3, *CANVAS.size))[BOX_REGRESSION].dtype == torch.float32


@pytest.mark.parametrize("channels_last", [True, False])
def test_backbone_maps_are_views(channels_last: bool) -> None:
    detector = small("gfl").eval()
    seen: list[list[Tensor]] = []
    detector.backbone.register_forward_hook(lambda _module, _inputs, maps: seen.append(maps))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    detector.to(memory_format=layout)
    with torch.no_grad():
        outputs = detector(torch.rand(2, 3, *CANVAS.size).to(memory_format=layout))
    for level, (name, stage) in enumerate(zip(BACKBONE[1:], seen[0], strict=True)):
        rows, columns = detector.grid.level_shapes(CANVAS)[level]
        assert outputs[name].shape == (2, rows * columns, stage.shape[1])
        assert torch.equal(outputs[name][1, columns + 2], stage[1, :, 1, 2])
        assert outputs[name].data_ptr() == stage.data_ptr()
        assert detector.specs()[name].per == f"level{level}"
        assert detector.specs()[name].dims == (stage.shape[1],)


def test_model_options_reach_the_detector() -> None:
    table = {"name": "fcos_shufflenet_v2_x0_5", "fpn_channels": 32, "tower_convs": 1, "reg_max": 8, "fcos": "plain"}
    options = build(TrainOptions, {"model": {**table, "box": "distribution"}})
    spec = make_student(options, 3).spec
    assert (spec.reg_max, spec.fcos, spec.box) == (8, "plain", "distribution")
    with pytest.raises(OptionError, match=r"model.box = 'distributon'.*did you mean 'distribution'"):
        build(TrainOptions, {"model": {**table, "box": "distributon"}})
