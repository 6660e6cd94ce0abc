"""Faster R-CNN opened into forward, loss and decode. Its numbers against torchvision: test_convert_torchvision.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, box_iou

from kdcli.detectors.base import ModelSpec, count_parameters
from kdcli.detectors.convert.recipes import TV_FASTER_RCNN_V2
from kdcli.detectors.two_stage.detector import RPN_DELTAS, RPN_LOGITS, TwoStageDetector
from kdcli.detectors.two_stage.recipes import FASTER_RCNN, TwoStageRecipe
from kdcli.detectors.two_stage.roi import levels_of, pool
from kdcli.errors import OptionError
from kdcli.structures import Canvas, Targets
from kdcli.tensors import BACKBONE, FEATURES, PROPOSAL_BOXES, PROPOSAL_LOGITS

CANVAS = Canvas(128, 160)
CELLS = 32 * 40 + 16 * 20 + 8 * 10 + 4 * 5 + 2 * 3
BOXES = [torch.tensor([[8.0, 8, 24, 26], [30, 20, 110, 96], [0, 0, 160, 128]]), torch.tensor([[50.0, 60, 90, 110]])]
NO_BOX = torch.empty(0, 4)


def small(
    backbone: str = "shufflenet_v2_x0_5", recipe: TwoStageRecipe = FASTER_RCNN, **options: object
) -> TwoStageDetector:
    """A small detector of 3 classes with reproducible weights."""
    torch.manual_seed(0)
    values: dict[str, object] = {"num_classes": 3, "fpn_channels": 16, "head_channels": 32, "bn": "train", **options}
    return TwoStageDetector(ModelSpec(recipe.name, backbone, **values), recipe)  # type: ignore[arg-type]


def make_targets(
    detector: TwoStageDetector, boxes: list[Tensor], *, content: tuple[int, int] = CANVAS.size, draws: list[int] | None
) -> Targets:
    """Labels count up."""
    return Targets(
        boxes=boxes,
        labels=[torch.arange(len(b)) % detector.spec.num_classes for b in boxes],
        content=torch.tensor([content] * len(boxes)),
        canvas=CANVAS,
        assigned=torch.empty(len(boxes), 0, dtype=torch.int32),
        valid=torch.stack([detector.grid.valid(CANVAS, content) for _ in boxes]),
        draws=None if draws is None else torch.tensor(draws),
    )


def outputs_of(detector: TwoStageDetector, images: int, seed: int = 0) -> dict[str, Tensor]:
    with torch.no_grad():
        return detector.eval()(torch.rand(images, 3, *CANVAS.size, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_shapes_are_what_specs_promise(backbone: str) -> None:
    detector = small(backbone)
    found = outputs_of(detector, 1)
    assert detector.grid.num_cells(CANVAS) == CELLS
    specs = detector.specs()
    sizes = [h * w for h, w in detector.grid.level_shapes(CANVAS)]
    rows = {"cell": CELLS, "anchor": 3 * CELLS, **{f"level{k}": size for k, size in enumerate(sizes)}}
    assert {k: tuple(v.shape) for k, v in found.items()} == {
        k: (1, rows[s.per], *s.dims) for k, s in specs.items() if s.per != "proposal"
    }
    assert set(specs) - set(found) == {PROPOSAL_BOXES, PROPOSAL_LOGITS}
    assert specs[PROPOSAL_LOGITS].dims == (4,)
    with torch.no_grad():
        turned = detector(torch.rand(1, 3, *CANVAS.transposed.size))
    assert {k: v.shape for k, v in turned.items()} == {k: v.shape for k, v in found.items()}


def test_stage_maps_are_views_that_cost_nothing() -> None:
    detector = small()
    stages = detector.backbone.stages(torch.rand(1, 3, *CANVAS.size))
    assert [s.shape[2:] for s in stages] == [(32, 40), (16, 20), (8, 10), (4, 5)]
    for form in (torch.contiguous_format, torch.channels_last):
        x = detector.to(memory_format=form).eval()(torch.rand(1, 3, *CANVAS.size).to(memory_format=form))
        assert all(x[name]._base is not None for name in BACKBONE)


def test_level_maps_undo_the_flattening() -> None:
    detector = small()
    features = torch.arange(2.0 * CELLS * 3).reshape(2, CELLS, 3)
    maps = detector.grid.level_maps(features, CANVAS)
    assert [m.shape[2:] for m in maps] == detector.grid.level_shapes(CANVAS)
    assert torch.equal(torch.cat([m.flatten(2).mT for m in maps], dim=1), features)


@pytest.mark.parametrize("recipe", [FASTER_RCNN, TV_FASTER_RCNN_V2], ids=lambda r: r.name)
def test_gradient_reaches_every_trainable_parameter(recipe: TwoStageRecipe) -> None:
    detector = small(recipe=recipe)
    losses = detector.loss(
        detector(torch.rand(2, 3, *CANVAS.size)), make_targets(detector, [BOXES[0], NO_BOX], draws=[1, 2])
    )
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_bbox"}
    assert all(v.ndim == 0 and torch.isfinite(v) and v > 0 for v in losses.values())
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for key, parameter in detector.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().max() > 0, key


def test_images_without_boxes_give_every_parameter_a_gradient() -> None:
    detector = small()
    losses = detector.loss(detector(torch.rand(1, 3, *CANVAS.size)), make_targets(detector, [NO_BOX], draws=None))
    assert losses["loss_rpn_box"] == losses["loss_bbox"] == 0
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for key, parameter in detector.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


def test_many_boxes_on_a_small_canvas() -> None:
    detector = small()
    corner = torch.rand(300, 2) * torch.tensor([140.0, 110])
    boxes = torch.cat([corner, corner + 1 + 15 * torch.rand(300, 2)], dim=1)
    losses = detector.loss(outputs_of(detector, 1), make_targets(detector, [boxes], draws=[3]))
    assert all(torch.isfinite(v) for v in losses.values())


def test_rois_are_pooled_as_torchvision_pools_them() -> None:
    detector = small()
    found = outputs_of(detector, 2)
    sides = torch.tensor([8.0, 56, 111.9, 112, 112.1, 128])
    boxes = [torch.stack([sides * 0, sides * 0, sides, sides], dim=1), BOXES[1]]
    maps = {str(k): m for k, m in enumerate(detector.grid.level_maps(found[FEATURES], CANVAS)[:4])}
    expected = MultiScaleRoIAlign(list(maps), 7, 2)(maps, boxes, [CANVAS.size] * 2)
    torch.testing.assert_close(pool(found[FEATURES], boxes, detector.grid, CANVAS), expected)
    big = torch.tensor([[0.0, 0, s, s] for s in (1, 111, 112, 223, 224, 447, 448, 5000)])
    assert levels_of(big).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    half = {k: v.bfloat16() for k, v in found.items()}
    assert pool(half[FEATURES], boxes, detector.grid, CANVAS).dtype == torch.float32


def test_decode_finds_what_the_heads_say() -> None:
    """A head that sees class 1 everywhere leaves one detection on the anchor that the RPN alone believes in."""
    detector = small()
    total = 3 * CELLS
    found = outputs_of(detector, 2)
    found[RPN_LOGITS] = torch.full((2, total, 1), -20.0)
    found[RPN_LOGITS][:, 600] = 20.0
    found[RPN_DELTAS] = torch.zeros(2, total, 4)
    detector.roi.cls.weight.data.zero_()
    detector.roi.box.weight.data.zero_()
    detector.roi.cls.bias.data = torch.tensor([0.0, 6.0, 0.0, 0.0])
    detector.roi.box.bias.data = torch.tensor([0.0, 0, 0, 0, 1.0, 0, 0, 0, 0, 0, 0, 0])  # right by a tenth of a width
    content = torch.tensor([CANVAS.size, (96, 120)])
    proposals = detector.proposals(found, content, CANVAS)
    anchor = detector.grid.anchors(CANVAS, torch.float32)[600]
    limits = [torch.tensor([160.0, 128] * 2), torch.tensor([120.0, 96] * 2)]
    for boxes, limit in zip(proposals, limits, strict=True):
        torch.testing.assert_close(boxes[0], anchor.clamp(min=0).minimum(limit))
        assert len(boxes) <= 1000
        assert (boxes <= limit).all()
        assert (boxes >= 0).all()
    shift = (proposals[0][0, 2] - proposals[0][0, 0]) * 0.1
    for image, limit in zip(detector.decode(found, content, CANVAS), limits, strict=True):
        assert (image.labels == 1).all()
        assert (image.scores > 0.98).all()
        assert len(image.boxes) <= 100
        assert (image.boxes <= limit).all()
        wanted = (proposals[0][0] + torch.tensor([1.0, 0, 1, 0]) * shift).minimum(limit)
        assert (image.boxes - wanted).abs().amax(dim=1).min() < 1e-3
    detector.roi.cls.bias.data = torch.tensor([0.0, 0.0, 0.0, 9.0])  # the background is the last
    assert all(len(d.boxes) == 0 for d in detector.decode(found, content, CANVAS))


def test_proposals_for_distillation() -> None:
    detector = small()
    found = outputs_of(detector, 2)
    targets = make_targets(detector, BOXES, draws=[1, 2])
    proposals = detector.proposals(found, targets.content, CANVAS)
    assert all(100 < len(p) <= 1000 and not p.requires_grad for p in proposals)
    listed = [torch.cat([p, b]) for p, b in zip(proposals, BOXES, strict=True)]
    indices, labels = detector.sample_proposals(listed, targets)
    again, _ = detector.sample_proposals(listed, targets)
    assert all(torch.equal(a, b) for a, b in zip(indices, again, strict=True))
    start = 0
    for index, boxes, own, image in zip(indices, listed, targets.labels, range(2), strict=True):
        label = labels[start : start + len(index)]
        start += len(index)
        overlap, nearest = box_iou(boxes[index], BOXES[image]).max(dim=1)
        assert torch.equal(label, torch.where(overlap >= 0.5, own[nearest], 3))
        assert (label < 3).sum() >= len(BOXES[image])  # the boxes themselves, which are few enough to be all drawn
    assert start == len(labels) <= 1024
    chosen = [b[i] for b, i in zip(listed, indices, strict=True)]
    logits, deltas = detector.roi_outputs(found, chosen, CANVAS)
    assert logits.shape == (len(labels), 4)
    assert deltas.shape == (len(labels), 3, 4)
    assert torch.equal(detector.proposal_logits(found, chosen, CANVAS), logits)
    apart = [detector.roi_outputs({k: v[i : i + 1] for k, v in found.items()}, [chosen[i]], CANVAS)[0] for i in (0, 1)]
    torch.testing.assert_close(torch.cat(apart), logits, atol=1e-5, rtol=1e-5)


def test_images_of_a_batch_do_not_influence_each_other() -> None:
    detector = small().eval()
    a, b, c = torch.rand(3, 3, *CANVAS.size)
    with torch.no_grad():
        alone, swapped = detector(torch.stack([a, b])), detector(torch.stack([c, a]))
    for key in alone:
        torch.testing.assert_close(alone[key][0], swapped[key][1], atol=1e-5, rtol=0)


def test_there_are_no_dense_boxes() -> None:
    detector = small()
    with pytest.raises(OptionError, match="faster_rcnn_shufflenet_v2_x0_5 predicts boxes for its proposals"):
        _ = detector.box_name
    with pytest.raises(OptionError, match="methods that read features or proposals work on it"):
        detector.dense_boxes({}, CANVAS)
    with pytest.raises(OptionError, match="not for every anchor"):
        detector.decode_boxes(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), CANVAS)
    with pytest.raises(OptionError, match=r"model\.box = 'distribution': faster_rcnn_resnet18 has no dense box"):
        small("resnet18", box="distribution")


def test_frozen_backbones_and_small_heads() -> None:
    detector = small("resnet18", bn="frozen").train()
    assert not detector.backbone.conv1.weight.requires_grad
    assert not detector.backbone.bn1.training
    assert detector.backbone.stage_channels == (64, 128, 256, 512)
    detector.loss(detector(torch.rand(1, 3, *CANVAS.size)), make_targets(detector, BOXES[:1], draws=[1]))
    assert count_parameters(small(head_channels=None).roi) > 16 * 49 * 1024 > count_parameters(detector.roi)
