"""A converted detector finds what torchvision's own model finds: same weights, same image, same detections."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops import FrozenBatchNorm2d

from kdcli.detectors.base import ModelSpec
from kdcli.detectors.convert.coco import COCO_CLASSES, COCO_IDS
from kdcli.detectors.convert.from_torchvision import SOURCES, convert_torchvision
from kdcli.detectors.convert.recipes import TORCHVISION, build_torchvision
from kdcli.detectors.two_stage.detector import RPN_DELTAS, RPN_LOGITS, TwoStageDetector
from kdcli.detectors.two_stage.matching import BACKGROUND, ROI_SAMPLE, RPN_SAMPLE, SampleRule, sample
from kdcli.detectors.two_stage.recipes import RPN_STDS
from kdcli.errors import OptionError
from kdcli.geometry.boxes import decode_deltas
from kdcli.geometry.grid import Grid
from kdcli.structures import IGNORED, Canvas, Targets
from kdcli.tensors import CLS_LOGITS, FEATURES, flatten_levels

CANVAS = Canvas(128, 160)  # P6 and P7 have a step of 53 and 80 px across, not of 64 and 128
SLOW = "fasterrcnn_resnet50_fpn_v2"  # four convs on each of 1000 proposals
QUICK = "retinanet_resnet50_fpn"
NAMES = [
    pytest.param(n, marks=pytest.mark.slow if n == SLOW else () if n == QUICK else pytest.mark.full) for n in SOURCES
]


def torchvision_model(name: str, outputs: int, **options: Any) -> Any:
    """torchvision's model on CANVAS as it is, with random weights of which some detections survive, in eval mode."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(
        name, weights=None, weights_backbone=None, num_classes=outputs, min_size=CANVAS.height, max_size=CANVAS.width,
        **options,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of the pass below, so that activations keep their size
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    for part in (model.backbone.fpn, model.rpn if hasattr(model, "rpn") else model.head):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    with torch.no_grad():
        model.train()
        model.backbone(torch.randn(2, 3, *CANVAS.size))
        model.eval()
        spread_outputs(model)
    return model


def spread_outputs(model: Any) -> None:
    """Box changes of a moderate size, class scores on both sides of the threshold."""
    images = model.transform([torch.rand(3, *CANVAS.size)])[0]
    named = model.backbone(images.tensors)
    features = list(named.values())
    if hasattr(model, "rpn"):
        logits, deltas = model.rpn.head(features)
        model.rpn.head.cls_logits.weight /= logits[0].std()
        model.rpn.head.bbox_pred.weight *= 0.2 / deltas[0].std()
        heads = model.roi_heads
        proposals = model.rpn(images, named)[0][0][:64]
        rows = heads.box_head(heads.box_roi_pool(named, [proposals], images.image_sizes))
        for layer, spread in ((heads.box_predictor.cls_score, 1.5), (heads.box_predictor.bbox_pred, 1.0)):
            nn.init.normal_(layer.weight)
            layer.weight *= spread / layer(rows).std(dim=0).mean()
            layer.bias -= layer(rows).mean(dim=0)
        return
    head = model.head
    spread = head.classification_head(features).std()
    head.classification_head.cls_logits.weight /= spread
    nn.init.normal_(head.classification_head.cls_logits.bias, mean=-3.0, std=0.5)
    output = head.regression_head(features)
    moved = output[0] if isinstance(output, tuple) else output
    head.regression_head.bbox_reg.weight *= 0.2 / moved.std()
    if isinstance(output, tuple):
        nn.init.constant_(head.regression_head.bbox_reg.bias, 1.5)  # edges away from 0, where relu holds them
        nn.init.constant_(head.regression_head.bbox_ctrness.bias, 1.0)


def silence(model: Any, dropped: list[int]) -> None:
    """Outputs that a converted model does not have never win."""
    if hasattr(model, "rpn"):
        model.roi_heads.box_predictor.cls_score.bias.data[dropped] = -1e4
    else:
        head = model.head.classification_head
        head.cls_logits.bias.data.view(head.num_anchors, head.num_classes)[:, dropped] = -1e4


@pytest.mark.parametrize("name", NAMES)
def test_detections_are_torchvisions(name: str) -> None:
    model = torchvision_model(name, 91)
    detector = convert_torchvision(model.state_dict(), name)
    first = 1 if name.startswith("fasterrcnn") else 0  # the output 0 of Faster R-CNN is its background
    silence(model, [i for i in range(first, 91) if i not in COCO_IDS])
    images = torch.rand(2, 3, *CANVAS.size)
    with torch.no_grad():
        expected = model(list(images))
        outputs = detector(images)
    found = detector.decode(outputs, torch.tensor([CANVAS.size] * 2), CANVAS)
    for theirs, ours in zip(expected, found, strict=True):
        assert len(theirs["boxes"][:100]) == len(ours.boxes) > 20
        ids = torch.tensor(COCO_IDS)[ours.labels]
        assert len(ids.unique()) > 3
        assert torch.equal(ids, theirs["labels"][:100])
        torch.testing.assert_close(ours.scores, theirs["scores"][:100], atol=2e-5, rtol=0)
        torch.testing.assert_close(ours.boxes, theirs["boxes"][:100], atol=2e-2, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_feature_logit_and_box_is_torchvisions(name: str) -> None:
    """Of all levels: detections are mostly of the fine ones. Of four outputs all but the first are kept, in order."""
    model = torchvision_model(name, 4)
    detector = convert_torchvision(model.state_dict(), name)
    assert detector.spec.num_classes == 3
    assert detector.spec.name == f"{SOURCES[name].recipe}_resnet50"
    assert not detector.training
    with torch.no_grad():
        image = torch.rand(1, 3, *CANVAS.size)
        images = model.transform(list(image))[0]
        maps = list(model.backbone(images.tensors).values())
        ours = detector(image)
        if isinstance(detector, TwoStageDetector):
            raw = model.rpn.head(maps)
            logits, deltas = flatten_levels(raw[0], (1,)), flatten_levels(raw[1], (4,))
            anchors = model.rpn.anchor_generator(images, maps)[0]
            boxes = model.rpn.box_coder.decode_single(deltas[0], anchors)
            grid_anchors = detector.grid.anchors(CANVAS, torch.float32)
            found = ours[RPN_LOGITS], decode_deltas(grid_anchors, ours[RPN_DELTAS][0], RPN_STDS)
        else:
            raw = model.head(maps)
            logits, deltas = raw["cls_logits"][..., 1:], raw["bbox_regression"][0]
            anchors = model.anchor_generator(images, maps)[0]
            coder = model.box_coder
            boxes = coder.decode(deltas, anchors) if "fcos" in name else coder.decode_single(deltas, anchors)
            found = ours[CLS_LOGITS], detector.dense_boxes(ours, CANVAS)[0]
    features = torch.cat([m.flatten(2).mT for m in maps], dim=1)
    torch.testing.assert_close(ours[FEATURES], features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0], logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], boxes, atol=2e-2, rtol=1e-4)


class _OurSampler:
    """torchvision's sampler drawing as ``sample`` does."""

    def __init__(self, rule: SampleRule, draws: list[int]) -> None:
        self.rule, self.draws = rule, draws

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        positive, negative = [], []
        for label, seed in zip(labels, self.draws, strict=True):
            owner = torch.where(label > 0, 0, BACKGROUND).masked_fill(label < 0, IGNORED)
            chosen = torch.zeros_like(label, dtype=torch.bool)
            chosen[sample(owner, self.rule, seed)] = True
            positive.append((chosen & (label > 0)).to(torch.uint8))
            negative.append((chosen & (label == 0)).to(torch.uint8))
        return positive, negative


@pytest.mark.full
@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", pytest.param(SLOW, marks=pytest.mark.slow)])
def test_losses_are_torchvisions(name: str) -> None:
    """The same anchors and proposals drawn, the four losses agree."""
    model = torchvision_model(name, 4)
    detector = convert_torchvision(model.state_dict(), name)
    assert isinstance(detector, TwoStageDetector)
    boxes = [torch.tensor([[8.0, 8, 40, 40], [30, 20, 110, 100]]), torch.tensor([[4.0, 60, 12, 68], [0, 0, 160, 128]])]
    labels = [torch.tensor([2, 0]), torch.tensor([1, 1])]
    draws = [11, 2**40]
    model.rpn.fg_bg_sampler = _OurSampler(RPN_SAMPLE, draws)
    model.roi_heads.fg_bg_sampler = _OurSampler(ROI_SAMPLE, draws)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images = torch.rand(2, 3, *CANVAS.size)
    targets = Targets(
        boxes=boxes,
        labels=labels,
        content=torch.tensor([CANVAS.size] * 2),
        canvas=CANVAS,
        assigned=torch.empty(2, 0, dtype=torch.int32),
        valid=torch.ones(2, detector.grid.num_cells(CANVAS), dtype=torch.bool),
        draws=torch.tensor(draws),
    )
    with torch.no_grad():
        expected = model(list(images), [{"boxes": b, "labels": c + 1} for b, c in zip(boxes, labels, strict=True)])
        found = detector.loss(detector(images), targets)
    names = {
        "loss_rpn_cls": "loss_objectness",
        "loss_rpn_box": "loss_rpn_box_reg",
        "loss_cls": "loss_classifier",
        "loss_bbox": "loss_box_reg",
    }
    for ours, theirs in names.items():
        assert expected[theirs] > 0
        torch.testing.assert_close(found[ours], expected[theirs], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("canvas", [CANVAS, Canvas(320, 320), Canvas(480, 608), Canvas(800, 1344)])
def test_anchors_are_torchvisions(canvas: Canvas) -> None:
    def sized(*sizes: int) -> AnchorGenerator:
        return AnchorGenerator(tuple((s,) for s in sizes), ((0.5, 1.0, 2.0),) * 5)

    images = ImageList(torch.zeros(1, 3, *canvas.size), [canvas.size])
    for name, generator in (
        ("tv_retinanet", _default_anchorgen()),
        ("tv_faster_rcnn", sized(32, 64, 128, 256, 512)),
    ):
        grid = TORCHVISION[name].grid
        maps = [torch.zeros(1, 1, h, w) for h, w in grid.level_shapes(canvas)]
        assert torch.equal(grid.anchors(canvas, torch.float32), generator(images, maps)[0])
    points = TORCHVISION["tv_fcos"].grid
    maps = [torch.zeros(1, 1, h, w) for h, w in points.level_shapes(canvas)]
    squares = AnchorGenerator(tuple((s,) for s in points.strides), ((1.0,),) * 5)(images, maps)[0]
    assert torch.equal(points.centers(canvas, torch.float32), (squares[:, :2] + squares[:, 2:]) / 2)
    assert Grid.from_json(points.to_json()) == points
    with pytest.raises(OptionError, match="stride_rule 'image_over_cells': unknown; did you mean 'image_over_grid'"):
        Grid(stride_rule="image_over_cells")  # type: ignore[arg-type]


@pytest.mark.full
def test_frozen_batch_norms_without_eps_are_folded() -> None:
    """A published v1 file: frozen batch norms, no counters, an eps of 0, and variances far below ours of 1e-5."""
    name = "retinanet_resnet50_fpn"
    model = torchvision_model(
        name, 91
    )  # COCO's outputs: else the file is a user's own, trained with torchvision's 1e-5
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    keys = [k for k in state if k.startswith("backbone.body.") and k.endswith("running_var")]
    state[keys[5]] = state[keys[5]] * 1e-8
    state[keys[5].replace("running_var", "weight")] *= 1e-4
    body = torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    for module in body.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
    body.load_state_dict({k.removeprefix("backbone.body."): v for k, v in state.items() if ".body." in k}, strict=False)
    body.eval()
    images = torch.randn(1, 3, *CANVAS.size)
    with torch.no_grad():
        x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        expected = body.layer2(body.layer1(x))
        (found, _, _), (other, _, _) = (
            convert_torchvision(state, name, bn_eps=eps).get_submodule("backbone")(images) for eps in (None, 1e-5)
        )
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert (other - expected).abs().max() > 0.1
    state[keys[0]] = state[keys[0]] * 0
    with pytest.raises(OptionError, match=r"backbone\.bn1 has a variance of 0 and an eps of 0\.0"):
        convert_torchvision(state, name)


@pytest.mark.full
def test_old_names_of_a_published_file_are_read() -> None:
    """The v1 files were written before torchvision put each conv into a block of its own."""
    name = "fasterrcnn_resnet50_fpn"
    state = torchvision_model(name, 3).state_dict()
    old = {}
    for key, value in state.items():
        key = re.sub(r"(inner|layer)_blocks\.(\d)\.0\.", r"\1_blocks.\2.", key)
        old[key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")] = value
    assert "rpn.head.conv.weight" in old
    assert "backbone.fpn.inner_blocks.0.weight" in old
    before = torch.get_rng_state()
    ours, theirs = (convert_torchvision(s, name).state_dict() for s in (old, state))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_table_is_torchvisions() -> None:
    listed = torchvision.models.get_model_weights("fcos_resnet50_fpn")["COCO_V1"].meta["categories"]
    assert [(c.id, c.name) for c in COCO_CLASSES] == [
        (i, n) for i, n in enumerate(listed) if n not in ("__background__", "N/A")
    ]
    assert len(COCO_CLASSES) == 80


def test_foreign_weights_are_refused() -> None:
    with pytest.raises(
        OptionError, match="torchvision model 'fcos_resnet50': unknown; did you mean 'fcos_resnet50_fpn'"
    ):
        convert_torchvision({}, "fcos_resnet50")
    with pytest.raises(OptionError, match=r"no 'head\.classification_head\.cls_logits\.bias'"):
        convert_torchvision({"fc.weight": torch.zeros(2, 2)}, "fcos_resnet50_fpn")
    with pytest.raises(OptionError, match="1 outputs are a background and no class"):
        convert_torchvision({"roi_heads.box_predictor.cls_score.bias": torch.zeros(1)}, "fasterrcnn_resnet50_fpn")
    with pytest.raises(OptionError, match=r"torchvision's fasterrcnn_resnet50_fpn: Error.* Missing key"):
        convert_torchvision({"roi_heads.box_predictor.cls_score.bias": torch.zeros(3)}, "fasterrcnn_resnet50_fpn")
    with pytest.raises(OptionError, match="detector 'tv_fco': unknown; did you mean 'tv_fcos'"):
        build_torchvision(ModelSpec("tv_fco", "resnet18", 3, bn="train"))
