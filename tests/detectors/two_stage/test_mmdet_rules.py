"""``mm_faster_rcnn`` against mmdet 3.3.0: matching, proposals, RoIAlign, losses, detections and first weights.

What mmdet computed is recorded; ``mmdet_cases/make_faster_rules.py`` made it, from what ``mmdet_faster.py`` draws.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.detectors.base import ModelSpec
from kdcli.detectors.build import build_detector, default_lr
from kdcli.detectors.convert.recipes import MM_FASTER_RCNN
from kdcli.detectors.two_stage import matching, proposals, roi
from kdcli.detectors.two_stage.detector import RPN_DELTAS, RPN_LOGITS, TwoStageDetector
from kdcli.detectors.two_stage.matching import DISTILLATION_SAMPLE, ROI_SAMPLE, RPN_SAMPLE, match_anchors
from kdcli.detectors.two_stage.proposals import find_proposals
from kdcli.detectors.two_stage.recipes import (
    BOX_STDS,
    DISTILLATION,
    FASTER_RCNN,
    ROI_WIDTH,
    RPN_STDS,
    TESTING,
    TORCHVISION_LOW_QUALITY,
    TwoStageRecipe,
)
from kdcli.geometry.boxes import pairwise_iou
from kdcli.structures import BACKGROUND, IGNORED, Targets
from kdcli.tensors import FEATURES
from tests.support import mmdet_faster as given
from tests.support.mmdet_case import case

ARRAYS = case("faster_rules")
GRID = MM_FASTER_RCNN.grid


def recorded(name: str) -> Tensor:
    return torch.from_numpy(ARRAYS[name])


def outputs(chosen: list[int]) -> dict[str, Tensor]:
    logits, deltas = given.rpn_outputs()
    return {
        RPN_LOGITS: logits[chosen].clone(), RPN_DELTAS: deltas[chosen].clone(),
        FEATURES: given.features()[chosen].clone(),
    }  # fmt: skip


def detector_of(recipe: TwoStageRecipe = MM_FASTER_RCNN) -> TwoStageDetector:
    """With the recorded RoI head."""
    spec = ModelSpec(
        recipe.name, "shufflenet_v2_x0_5", given.CLASSES, fpn_channels=given.CHANNELS, head_channels=given.WIDTH, bn="train"
    )  # fmt: skip
    detector = TwoStageDetector(spec, recipe)
    ours = ("body.fc6", "body.fc7", "cls", "box")
    theirs = ("shared_fcs.0", "shared_fcs.1", "fc_cls", "fc_reg")
    weights = given.head()
    names = {
        f"{a}.{end}": weights[f"{b}.{end}"] for a, b in zip(ours, theirs, strict=True) for end in ("weight", "bias")
    }
    detector.roi.load_state_dict(names)
    return detector


def targets_of(chosen: list[int]) -> Targets:
    return Targets(
        boxes=[given.boxes()[k] for k in chosen],
        labels=[given.labels()[k] for k in chosen],
        content=torch.tensor([given.CONTENT[k] for k in chosen]),
        canvas=given.CANVAS,
        assigned=torch.empty(len(chosen), 0, dtype=torch.int32),
        valid=torch.stack([GRID.valid(given.CANVAS, given.CONTENT[k]) for k in chosen]),
    )


@pytest.fixture
def draw_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of every candidate, as recorded: no random number decides."""
    monkeypatch.setattr("kdcli.detectors.two_stage.losses.RPN_SAMPLE", replace(RPN_SAMPLE, size=10**6))
    monkeypatch.setattr("kdcli.detectors.two_stage.detector.ROI_SAMPLE", replace(ROI_SAMPLE, size=10**6))


def test_the_numbers_are_those_of_mmdets_config() -> None:
    settings: dict[str, Any] = json.loads(str(ARRAYS["settings"]))
    rpn, rpn_proposal, rcnn = (settings["train_cfg"][k] for k in ("rpn", "rpn_proposal", "rcnn"))
    recipe = MM_FASTER_RCNN
    assigner = rpn["assigner"]
    assert (assigner["pos_iou_thr"], assigner["neg_iou_thr"]) == (matching.RPN_POSITIVE, matching.RPN_NEGATIVE)
    assert (assigner["min_pos_iou"], assigner["match_low_quality"]) == (recipe.low_quality.min_iou, True)
    assert {rcnn["assigner"][k] for k in ("pos_iou_thr", "neg_iou_thr", "min_pos_iou")} == {matching.ROI_POSITIVE}
    assert not rcnn["assigner"]["match_low_quality"]
    for part, rule in ((rpn, RPN_SAMPLE), (rcnn, ROI_SAMPLE), (rcnn, DISTILLATION_SAMPLE)):
        assert (part["sampler"]["num"], part["sampler"]["pos_fraction"]) == (rule.size, rule.positive)
    testing = settings["test_cfg"]["rpn"]
    for part, rule in ((rpn_proposal, recipe.training), (testing, TESTING), (rpn_proposal, DISTILLATION)):
        assert (part["nms_pre"], part["max_per_img"]) == (rule.before, rule.after)  # type: ignore[attr-defined]
        assert (part["nms"]["iou_threshold"], part["min_bbox_size"]) == (proposals.NMS_IOU, recipe.proposal_side)
    last = settings["test_cfg"]["rcnn"]
    assert (last["score_thr"], last["nms"]["iou_threshold"], last["max_per_img"]) == (
        roi.SCORE_THRESHOLD, roi.NMS_IOU, roi.MAX_PER_IMAGE
    )  # fmt: skip
    dense, head = settings["rpn_head"], settings["roi_head"]["bbox_head"]
    assert (dense["loss_bbox"]["type"], head["loss_bbox"]["type"], recipe.smooth_l1_beta) == ("L1Loss", "L1Loss", 0)
    weights = [part[k]["loss_weight"] for part in (dense, head) for k in ("loss_cls", "loss_bbox")]
    assert weights == [1.0] * 4
    stds = tuple(tuple(part["bbox_coder"]["target_stds"]) for part in (dense, head))
    assert stds == (RPN_STDS, BOX_STDS)
    anchors = dense["anchor_generator"]
    assert tuple(anchors["strides"]) == GRID.strides
    assert (anchors["ratios"], anchors["scales"]) == (list(GRID.ratios), [GRID.base_scale])
    assert (head["fc_out_channels"], head["roi_feat_size"]) == (ROI_WIDTH, roi.SIZE)
    pooling = settings["roi_head"]["bbox_roi_extractor"]["roi_layer"]
    assert pooling["sampling_ratio"] == recipe.pooling.samples
    assert default_lr("mm_faster_rcnn") == settings["optimizer"]["optimizer"]["lr"] == 0.02
    assert {default_lr(name) for name in ("faster_rcnn", "tv_faster_rcnn", "gfl", "fcos", "tv_retinanet")} == {0.01}


@pytest.mark.parametrize("image", [0, 1, 2])
def test_anchors_get_mmdets_boxes(image: int) -> None:
    """Equal for every anchor; those outside the padded image are looked at by neither."""
    expected = recorded(f"owner_{image}").long()
    valid = GRID.valid_anchors(given.CANVAS, given.CONTENT[image])
    assert torch.equal(expected == -9, ~valid)
    anchors = GRID.anchors(given.CANVAS, torch.float32)[valid]
    boxes = given.boxes()[image]
    found = match_anchors(anchors, boxes, MM_FASTER_RCNN.low_quality)
    numbers = torch.where(found == BACKGROUND, 0, torch.where(found == IGNORED, -1, found + 1))
    assert torch.equal(numbers, expected[valid])


def test_boxes_of_low_quality() -> None:
    """What mmdet's two rules change on the first image, beside torchvision's."""
    boxes, anchors = given.boxes()[0], GRID.anchors(given.CANVAS, torch.float32)
    overlap = pairwise_iou(boxes, anchors)
    best = overlap.amax(dim=1)
    assert best[0] > 0.7
    assert 0.3 < best[1] < 0.7
    assert best[2] < 0.3
    mmdets = match_anchors(anchors, boxes, MM_FASTER_RCNN.low_quality)
    torchvisions = match_anchors(anchors, boxes, TORCHVISION_LOW_QUALITY)
    assert (mmdets == 1).sum() > 0
    # the tiny box: no anchor; torchvision trains all that contain it, for the larger boxes that they overlap a bit more
    tiny = (overlap[2] > best[2] - 1e-6) & (overlap.amax(dim=0) < 0.7)
    assert (mmdets[tiny] < 0).all()
    assert torch.equal(torchvisions[tiny], overlap.argmax(dim=0)[tiny])
    assert tiny.sum() == 129
    # an anchor is the best one of two boxes: the later has it, though it overlaps the other one more, or equally
    changed = torch.nonzero((mmdets != torchvisions) & ~tiny).squeeze(1)
    assert [(int(mmdets[k]), int(torchvisions[k])) for k in changed] == [(7, 6), (5, 3)]


def test_rounding_chooses_among_equal_overlaps_as_in_mmdet() -> None:
    """The last box of the second image lies around several anchors. Decision 24 has what a tolerance would do."""
    rule, box = MM_FASTER_RCNN.low_quality, given.boxes()[1][2:]
    anchors = GRID.anchors(given.CANVAS, torch.float32)
    mmdets = match_anchors(anchors, box, rule) == 0
    all_in_the_tie = match_anchors(anchors, box, replace(rule, tie=1e-6)) == 0
    assert (mmdets <= all_in_the_tie).all()
    assert (int(mmdets.sum()), int(all_in_the_tie.sum())) == (4, 8)


@pytest.mark.parametrize(("name", "rule"), [("train", MM_FASTER_RCNN.training), ("test", TESTING)])
def test_proposals_are_mmdets(name: str, rule: Any) -> None:
    logits, deltas = given.rpn_outputs()
    content = torch.tensor(given.CONTENT)
    found = find_proposals(logits, deltas, MM_FASTER_RCNN, content, given.CANVAS, rule)
    for image, boxes in enumerate(found):
        expected = recorded(f"{name}_boxes_{image}")
        assert len(expected) == 1000 or image == 1
        scores = recorded(f"{name}_scores_{image}")
        moved = (boxes - expected).abs().amax(dim=1) > 1e-4
        if moved.any():  # equal scores in another order
            assert (moved.sum(), len(scores[moved].unique())) == (2, 1)
            boxes[moved] = boxes[moved].flip(0)
        torch.testing.assert_close(boxes, expected, atol=1e-4, rtol=0)
    more = find_proposals(logits, deltas, FASTER_RCNN, content, given.CANVAS, FASTER_RCNN.training)
    assert max(len(boxes) for boxes in more) > 1000


def test_pooling_is_mmdets() -> None:
    rois = given.rois()
    order = torch.argsort(rois[:, 0], stable=True)  # ours takes the boxes by image
    per_image = [rois[rois[:, 0] == k, 1:] for k in range(3)]
    pooled = roi.pool(given.features(), per_image, GRID, given.CANVAS, MM_FASTER_RCNN.pooling)
    torch.testing.assert_close(pooled[:, :2], recorded("pooled")[order], atol=1e-5, rtol=1e-5)
    levels = roi.levels_of(rois[:, 1:], MM_FASTER_RCNN.pooling)
    assert torch.equal(levels, recorded("roi_levels"))
    assert set(levels.tolist()) == {0, 1, 2, 3}


@pytest.mark.usefixtures("draw_all")
@pytest.mark.parametrize("name", ["all", "0", "1", "2"])
def test_losses_and_gradients_are_mmdets(name: str) -> None:
    chosen = [0, 1, 2] if name == "all" else [int(name)]
    detector, read = detector_of(), outputs(chosen)
    for value in read.values():
        value.requires_grad_()
    terms = detector.loss(read, targets_of(chosen))
    names = {
        "loss_rpn_cls": "loss_rpn_cls",
        "loss_rpn_box": "loss_rpn_bbox",
        "loss_cls": "loss_cls",
        "loss_bbox": "loss_bbox",
    }
    assert set(terms) == set(names)
    for ours, theirs in names.items():
        torch.testing.assert_close(terms[ours], recorded(f"loss_{name}_{theirs}"), atol=1e-6, rtol=1e-5)
    if name == "all":
        sum(terms.values()).backward()  # type: ignore[union-attr]
        found = {
            "logits": read[RPN_LOGITS].grad, "deltas": read[RPN_DELTAS].grad, "features": read[FEATURES].grad,
            "fc_reg": detector.roi.box.weight.grad,
        }  # fmt: skip
        for key, gradient in found.items():
            assert gradient is not None
            expected = recorded(f"grad_{key}")
            assert expected.abs().max() > 0
            torch.testing.assert_close(
                gradient.flatten()[::7], expected, atol=1e-5 * float(expected.abs().max()), rtol=0
            )


@pytest.mark.parametrize(("chosen", "count"), [([2], 257), ([0, 2], 256 + 257)])
def test_an_image_without_positives_counts_one_more(chosen: list[int], count: int) -> None:
    read = {k: torch.zeros_like(v) for k, v in outputs(chosen).items()}
    found = detector_of().loss(read, targets_of(chosen))["loss_rpn_cls"]
    torch.testing.assert_close(found, recorded("loss_equal_" + "".join(map(str, chosen))), atol=0, rtol=1e-6)
    assert float(found) == pytest.approx(256 * len(chosen) / count * 0.693147, rel=1e-5)
    plain = detector_of(FASTER_RCNN).loss(read, targets_of(chosen))["loss_rpn_cls"]
    assert float(plain) == pytest.approx(0.693147, rel=1e-5)


def test_detections_are_mmdets() -> None:
    found = detector_of().eval().decode(outputs([0, 1, 2]), torch.tensor(given.CONTENT), given.CANVAS)
    for image, ours in enumerate(found):
        assert len(ours.boxes) == 100
        torch.testing.assert_close(ours.scores, recorded(f"scores_{image}"), atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.boxes, recorded(f"boxes_{image}"), atol=1e-3, rtol=0)
        assert torch.equal(ours.labels, recorded(f"labels_{image}").long())


def test_equal_boxes_keep_their_own_labels() -> None:
    """The two equal boxes at the end of the first image's list are proposals for themselves; torchvision's rule gives
    both to the first."""
    targets, boxes = targets_of([0]), given.boxes()[0]
    own = {}
    for recipe in (MM_FASTER_RCNN, FASTER_RCNN):
        indices, labels = detector_of(recipe).sample_proposals([boxes], targets)
        assert torch.equal(indices[0], torch.arange(8))
        own[recipe.name] = labels.tolist()
    assert own == {"mm_faster_rcnn": [0, 1, 2, 0, 1, 2, 0, 1], "faster_rcnn": [0, 1, 2, 0, 1, 2, 0, 0]}


def test_weights_start_as_mmdets_do() -> None:
    """Standard deviation and largest value of each tensor, of the same architecture with 64 channels and 256 wide."""
    torch.manual_seed(1)
    spec = ModelSpec("mm_faster_rcnn", "resnet18", given.CLASSES, fpn_channels=64, head_channels=256, bn="train")
    detector = build_detector(spec)
    ours = {k: v for k, v in detector.named_parameters() if not k.startswith("backbone.")}
    names = {
        "neck.inner_blocks.": "neck.lateral_convs.", "neck.layer_blocks.": "neck.fpn_convs.", ".0.weight": ".conv.weight",
        ".0.bias": ".conv.bias", "rpn.conv.0.conv.": "rpn_head.rpn_conv.", "rpn.cls_logits.": "rpn_head.rpn_cls.",
        "rpn.bbox_pred.": "rpn_head.rpn_reg.", "roi.body.fc6.": "roi_head.bbox_head.shared_fcs.0.",
        "roi.body.fc7.": "roi_head.bbox_head.shared_fcs.1.", "roi.cls.": "roi_head.bbox_head.fc_cls.",
        "roi.box.": "roi_head.bbox_head.fc_reg.",
    }  # fmt: skip
    seen = json.loads(str(ARRAYS["init"]))
    assert len(ours) == len(seen)
    for key, value in ours.items():
        name = key
        for old, new in names.items():
            name = name.replace(old, new)
        std, largest = seen[name]
        if key.endswith("bias"):
            assert largest == float(value.detach().abs().max()) == 0, key
        else:
            assert float(value.detach().std()) == pytest.approx(std, rel=4 / (2 * value.numel()) ** 0.5 + 1e-3), key
            uniform = key.startswith(("neck.", "roi.body."))
            assert float(value.detach().abs().max()) == pytest.approx(largest, rel=0.02 if uniform else 0.4), key
