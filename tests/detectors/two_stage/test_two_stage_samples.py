"""Faster R-CNN's matching and sampling: torchvision's rules, and samples that depend on an image's draw alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from kdcli.detectors.base import ModelSpec
from kdcli.detectors.convert.recipes import TV_FASTER_RCNN
from kdcli.detectors.two_stage.detector import RPN_DELTAS, RPN_LOGITS, TwoStageDetector
from kdcli.detectors.two_stage.matching import (
    ROI_SAMPLE,
    RPN_SAMPLE,
    SampleRule,
    match_anchors,
    match_proposals,
    sample,
)
from kdcli.detectors.two_stage.proposals import find_proposals
from kdcli.detectors.two_stage.recipes import FASTER_RCNN, TRAINING
from kdcli.structures import BACKGROUND, IGNORED, Canvas, Targets

CANVAS = Canvas(128, 160)
BOXES = [torch.tensor([[8.0, 8, 24, 26], [30, 20, 110, 96], [0, 0, 160, 128]]), torch.tensor([[50.0, 60, 90, 110]])]
NO_BOX = torch.empty(0, 4)
ANCHORS = TV_FASTER_RCNN.grid.anchors(CANVAS, torch.float32)  # whole pixels


@pytest.fixture(scope="module")
def detector() -> TwoStageDetector:
    """A small detector of 3 classes with reproducible weights, in eval mode."""
    torch.manual_seed(0)
    spec = ModelSpec("faster_rcnn", "shufflenet_v2_x0_5", 3, fpn_channels=16, head_channels=32, bn="train")
    return TwoStageDetector(spec, FASTER_RCNN).eval()


def outputs_of(detector: TwoStageDetector, images: int) -> dict[str, Tensor]:
    """Of the same random images each time."""
    with torch.no_grad():
        return detector(torch.rand(images, 3, *CANVAS.size, generator=torch.Generator().manual_seed(0)))


def make_targets(
    detector: TwoStageDetector, boxes: list[Tensor], *, content: tuple[int, int] = CANVAS.size, draws: list[int] | None
) -> Targets:
    """Labels count up."""
    return Targets(
        boxes=boxes,
        labels=[torch.arange(len(b)) % 3 for b in boxes],
        content=torch.tensor([content] * len(boxes)),
        canvas=CANVAS,
        assigned=torch.empty(len(boxes), 0, dtype=torch.int32),
        valid=torch.stack([detector.grid.valid(CANVAS, content) for _ in boxes]),
        draws=None if draws is None else torch.tensor(draws),
    )


def test_a_batch_is_its_images_together(detector: TwoStageDetector) -> None:
    """Samples follow an image's draw and not its neighbours; sums are divided by the samples of the whole batch."""
    found = outputs_of(detector, 2)
    targets = make_targets(detector, BOXES, draws=[7, 2**62])
    whole = detector.loss(found, targets)
    single = []
    for i in range(2):
        part = make_targets(detector, BOXES[i : i + 1], draws=[int(targets.draws[i])])  # type: ignore[index]
        part = replace(part, labels=targets.labels[i : i + 1])
        single.append(detector.loss({k: v[i : i + 1] for k, v in found.items()}, part))
    logits, deltas = found[RPN_LOGITS], found[RPN_DELTAS]
    proposals = find_proposals(logits, deltas, detector.recipe, targets.content, CANVAS, TRAINING)
    listed = [torch.cat([p, b]) for p, b in zip(proposals, BOXES, strict=True)]
    counts = [len(sample(match_proposals(p, b), ROI_SAMPLE, 0)) for p, b in zip(listed, BOXES, strict=True)]
    for key, value in whole.items():
        shares = [0.5, 0.5] if "rpn" in key else [c / sum(counts) for c in counts]
        assert torch.allclose(value, sum(s * t[key] for s, t in zip(shares, single, strict=True)), rtol=1e-5)  # type: ignore[arg-type]


def test_draws_alone_decide_the_samples(detector: TwoStageDetector) -> None:
    found = outputs_of(detector, 2)
    terms = []
    for draws, noise in (([5, 6], 0), ([5, 6], 1), ([5, 7], 0), (None, 0), (None, 1)):
        torch.manual_seed(noise)
        terms.append(detector.loss(found, make_targets(detector, BOXES, draws=draws))["loss_rpn_cls"])
    assert terms[0] == terms[1] != terms[2]
    assert terms[3] == terms[4]


@pytest.mark.parametrize("rule", [RPN_SAMPLE, ROI_SAMPLE])
def test_samples_hold_the_shares(rule: SampleRule) -> None:
    most = int(rule.size * rule.positive)
    for positives, negatives in ((0, 10), (3, 2000), (most + 50, 2000), (most + 50, 5), (20, 0)):
        owner = torch.cat([torch.arange(positives), torch.full((negatives,), BACKGROUND), torch.full((9,), IGNORED)])
        owner = owner[torch.randperm(len(owner))]
        index = sample(owner, rule, 4)
        drawn = owner[index]
        assert (drawn >= 0).sum() == min(positives, most)
        assert (drawn == BACKGROUND).sum() == min(negatives, rule.size - min(positives, most))
        assert (drawn != IGNORED).all()
        assert (index[1:] > index[:-1]).all()
        assert torch.equal(index, sample(owner, rule, 4))
    assert not torch.equal(index, sample(owner, rule, 5)) or negatives == 0


def test_anchors_match_as_torchvisions_do() -> None:
    """Whole-pixel boxes on whole-pixel anchors, so that equal IoUs are equal numbers there, too."""
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    for boxes in (
        BOXES[0],
        BOXES[1],
        torch.tensor([[0.0, 0, 32, 32], [0, 0, 31, 32]]),
        torch.tensor([[3.0, 3, 155, 120]]).repeat(40, 1) + torch.arange(40)[:, None] % 3,
    ):
        expected = matcher(box_iou(boxes, ANCHORS))
        found = match_anchors(ANCHORS, boxes)
        assert torch.equal(found >= 0, expected >= 0)
        assert torch.equal(found == IGNORED, expected == matcher.BETWEEN_THRESHOLDS)
        assert torch.equal(found[found >= 0], expected[expected >= 0])
    assert (match_anchors(ANCHORS, NO_BOX) == BACKGROUND).all()


def test_a_small_box_takes_every_anchor_in_a_tie() -> None:
    """An 8-pixel box inside many 32-pixel anchors has the IoU 1/16 with each of them."""
    box = torch.tensor([[60.3, 60.3, 68.3, 68.3]])
    inside = ((ANCHORS[:, :2] <= box[:, :2]) & (ANCHORS[:, 2:] >= box[:, 2:])).all(dim=1)
    small_anchor = (ANCHORS[:, 2:] - ANCHORS[:, :2]).prod(dim=1) < 1100
    owner = match_anchors(ANCHORS, box)
    assert (owner >= 0).sum() > 20
    assert (inside & small_anchor)[owner >= 0].all()
    assert (match_proposals(box, NO_BOX) == BACKGROUND).all()


def test_no_loss_reads_anchors_outside_the_content(detector: TwoStageDetector) -> None:
    found = outputs_of(detector, 1)
    content = (60, 90)  # valid up to 64 x 96
    targets = make_targets(detector, [torch.tensor([[10.0, 10, 50, 50]])], content=content, draws=[1])
    outside = ~detector.grid.valid_anchors(CANVAS, content)
    assert outside.any()
    before = detector.loss(found, targets)
    logits = torch.where(outside[None, :, None], found[RPN_LOGITS] - 50, found[RPN_LOGITS])
    after = detector.loss({**found, RPN_LOGITS: logits}, targets)
    assert before["loss_rpn_cls"] == after["loss_rpn_cls"]
