"""Losses and decoding of the dense heads beyond the reference numbers: empty batches, autocast, normalisers, ties."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from kdcli.detectors.dense.decode import decode
from kdcli.detectors.dense.losses import (
    atss_loss,
    distribution_focal,
    fcos_loss,
    gfl_loss,
    quality_focal,
    retinanet_loss,
)
from kdcli.geometry.assign import AssignerSpec, assign
from kdcli.geometry.grid import Grid
from kdcli.structures import IGNORED, Canvas, Targets

CANVAS, CONTENT, K = Canvas(96, 128), (60, 120), 3  # valid: 64 x 128
GRID = Grid()
RETINA = Grid(base_scale=4.0, scales=(1.0, 2 ** (1 / 3), 2 ** (2 / 3)), ratios=(0.5, 1.0, 2.0))
BOXES = torch.tensor([[10.0, 12.0, 60.0, 50.0], [70.0, 8.0, 118.0, 58.0]])
LABELS = torch.tensor([2, 0])
POINTS = Grid(offset=0.5)
FCOS_KINDS = ["fcos", "fcos plain", "fcos distribution"]
KINDS = ["gfl", "retinanet", "atss", "retinanet distribution", "atss distribution", *FCOS_KINDS]
ASSIGNERS = {
    "gfl": AssignerSpec("atss"),
    "atss": AssignerSpec("atss"),
    "retinanet": AssignerSpec("max_iou"),
    "fcos": AssignerSpec("fcos", center_radius=1.5),
}


def grid_of(kind: str) -> Grid:
    return {"retinanet": RETINA, "fcos": POINTS}.get(kind.split()[0], GRID)


def targets_of(kind: str, counts: list[int]) -> Targets:
    """A batch whose images have the first ``counts[i]`` of two boxes."""
    grid, spec = grid_of(kind), ASSIGNERS[kind.split()[0]]
    boxes = [BOXES[:n] for n in counts]
    return Targets(
        boxes=boxes,
        labels=[LABELS[:n] for n in counts],
        content=torch.tensor([CONTENT] * len(counts)),
        canvas=CANVAS,
        assigned=torch.stack([assign(spec, grid, CANVAS, b, CONTENT) for b in boxes]),
        valid=torch.stack([grid.valid(CANVAS, CONTENT)] * len(counts)),
    )


def outputs_of(kind: str, batch: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    detector, _, form = kind.partition(" ")
    box = (4, 9) if detector == "gfl" or form == "distribution" else (4,)
    trailing = [(K,), box, (1,)] if detector in ("atss", "fcos") else [(K,), box]
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, grid_of(kind).num_total(CANVAS), *t) for t in trailing]
    outputs = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    if detector == "fcos" and form != "distribution":
        outputs[1] = outputs[1].abs()  # distances
    return [o.requires_grad_() for o in outputs]


def loss_of(kind: str, outputs: list[Tensor], targets: Targets) -> dict[str, Tensor]:
    if kind == "gfl":
        return gfl_loss(outputs[0], outputs[1], targets, GRID)
    if kind.startswith("retinanet"):
        return retinanet_loss(outputs[0], outputs[1], targets, RETINA)
    if kind in FCOS_KINDS:
        return fcos_loss(*outputs, targets, POINTS, log_iou=kind == "fcos plain")  # type: ignore[misc]
    return atss_loss(outputs[0], outputs[1], outputs[2], targets, GRID)


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_boxes_give_zeros_with_a_graph(kind: str) -> None:
    outputs = outputs_of(kind, 2)
    losses = loss_of(kind, outputs, targets_of(kind, [0, 0]))
    assert losses["loss_cls"] > 0
    for name, loss in losses.items():
        assert loss.requires_grad, name
        if name != "loss_cls":
            assert float(loss.detach()) == 0.0, name
    sum(losses.values(), torch.zeros(())).backward()
    for output in outputs:
        assert output.grad is not None
        assert torch.isfinite(output.grad).all()


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in FCOS_KINDS])
def test_ignored_anchors_get_no_gradient(kind: str) -> None:
    outputs, targets = outputs_of(kind, 2), targets_of(kind, [2, 1])
    losses = loss_of(kind, outputs, targets)
    assert all(loss > 0 for loss in losses.values())
    sum(losses.values(), torch.zeros(())).backward()
    ignored = targets.assigned == IGNORED
    assert ignored.any()
    for output in outputs:
        assert output.grad is not None
        assert not output.grad[ignored].any()
        assert output.grad[~ignored].any()


@pytest.mark.parametrize("kind", FCOS_KINDS)
def test_fcos_reads_the_padding_as_background(kind: str) -> None:
    outputs, targets = outputs_of(kind, 2), targets_of(kind, [2, 1])
    losses = loss_of(kind, outputs, targets)
    assert all(loss > 0 for loss in losses.values())
    sum(losses.values(), torch.zeros(())).backward()
    assert (~targets.valid).any()
    assert outputs[0].grad is not None
    assert (outputs[0].grad[~targets.valid] > 0).all()
    positive = targets.assigned >= 0
    for output in outputs[1:]:
        assert output.grad is not None
        assert not output.grad[~positive].any()


def test_fcos_divides_by_the_positives_of_the_batch() -> None:
    """An image without boxes adds its class loss, and nothing to the divisor."""
    outputs = outputs_of("fcos", 2)
    both = loss_of("fcos", outputs, targets_of("fcos", [2, 0]))
    alone = loss_of("fcos", [o[:1] for o in outputs], targets_of("fcos", [2]))
    for name in ("loss_bbox", "loss_centerness"):
        torch.testing.assert_close(both[name], alone[name])
    positives = int((targets_of("fcos", [2]).assigned >= 0).sum())
    empty = loss_of("fcos", [o[1:] for o in outputs], targets_of("fcos", [0]))  # divided by 1
    torch.testing.assert_close(both["loss_cls"], alone["loss_cls"] + empty["loss_cls"] / positives)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.endswith("distribution")])
def test_one_hot_at_the_true_edges_has_no_box_loss(kind: str) -> None:
    """Boxes whose edges lie whole strides from the centres of their positives."""
    grid = POINTS if kind.startswith("fcos") else RETINA if kind.startswith("retinanet") else GRID
    stride, cell = 8, 3 * 16 + 5  # of the finest level: row 3, column 5
    center = grid.centers(CANVAS, torch.float32)[cell]
    distances = torch.tensor([2, 1, 3, 2])
    low, high = center - distances[:2] * stride, center + distances[2:] * stride
    anchor = cell * grid.num_anchors + grid.num_anchors // 2
    assigned = torch.full((1, grid.num_total(CANVAS)), -1, dtype=torch.int32)
    assigned[0, anchor] = 0
    box = torch.cat([low, high])[None]
    targets = Targets(
        boxes=[box], labels=[LABELS[:1]], content=torch.tensor([CONTENT]), canvas=CANVAS, assigned=assigned,
        valid=grid.valid(CANVAS, CONTENT)[None],
    )  # fmt: skip
    outputs = outputs_of(kind, 1)
    rows = torch.full((4, 9), -1e4)
    rows[range(4), distances] = 1e4
    exact = outputs[1].detach().clone()
    exact[0, anchor] = rows
    off = exact.clone()
    off[0, anchor] = rows.roll(1, dims=-1)
    loss = loss_of(kind, [outputs[0], exact, *outputs[2:]], targets)["loss_bbox"]
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert loss_of(kind, [outputs[0], off, *outputs[2:]], targets)["loss_bbox"] > 0.1


def test_weights_of_the_distribution_losses() -> None:
    """GIoU x2 on RetinaNet and ATSS, x1 on FCOS, in a case that is reckoned by hand: a hull twice the true box."""
    for kind, weight in (("retinanet distribution", 2.0), ("atss distribution", 2.0), ("fcos distribution", 1.0)):
        grid = grid_of(kind)
        center = grid.centers(CANVAS, torch.float32)[53]
        targets = targets_of(kind, [0])
        targets.assigned[0, 53 * grid.num_anchors] = 0
        box = torch.cat([center - 16, center + 16])[None]  # 4 x 4 strides around the centre: centerness 1
        targets = Targets(
            boxes=[box], labels=[LABELS[:1]], content=targets.content, canvas=CANVAS, assigned=targets.assigned,
            valid=targets.valid,
        )  # fmt: skip
        outputs = outputs_of(kind, 1)
        rows = torch.full((4, 9), -1e4)
        rows[range(4), [2, 2, 6, 2]] = 1e4  # 8 x 4 strides: IoU = GIoU = 1/2
        predicted = outputs[1].detach().clone()
        predicted[0, 53 * grid.num_anchors] = rows
        loss = loss_of(kind, [outputs[0], predicted, *outputs[2:]], targets)["loss_bbox"]
        assert float(loss.detach()) == pytest.approx(weight / 2, rel=1e-5), kind


def test_plain_fcos_has_the_log_of_the_iou() -> None:
    center = POINTS.centers(CANVAS, torch.float32)[53]
    empty = targets_of("fcos", [0])
    empty.assigned[0, 53] = 0
    box = torch.cat([center - 16, center + 16])[None]
    targets = Targets(
        boxes=[box], labels=[LABELS[:1]], content=empty.content, canvas=CANVAS, assigned=empty.assigned,
        valid=empty.valid,
    )  # fmt: skip
    outputs = outputs_of("fcos plain", 1)
    predicted = outputs[1].detach().clone()
    predicted[0, 53] = torch.tensor([2.0, 2.0, 6.0, 2.0])
    loss = loss_of("fcos plain", [outputs[0], predicted, outputs[2]], targets)["loss_bbox"]
    assert float(loss.detach()) == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_change_the_loss(kind: str) -> None:
    outputs, targets = outputs_of(kind, 2, torch.bfloat16), targets_of(kind, [2, 1])
    outside = loss_of(kind, outputs, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss_of(kind, outputs, targets)
    for name, loss in inside.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, outside[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_images_does_not_matter(kind: str) -> None:
    outputs = outputs_of(kind, 3)
    losses = loss_of(kind, outputs, targets_of(kind, [2, 0, 1]))
    mirrored = loss_of(kind, [o.flip(0) for o in outputs], targets_of(kind, [1, 0, 2]))
    for name, loss in losses.items():
        torch.testing.assert_close(loss, mirrored[name])


def test_gfl_normaliser_is_clamped_unless_eps_is_given() -> None:
    outputs, targets = outputs_of("gfl", 2), targets_of("gfl", [2, 1])
    low = [outputs[0] - 12, outputs[1]]  # the positives' scores sum to far less than 1
    clamped = gfl_loss(low[0], low[1], targets, GRID)["loss_bbox"]
    free = gfl_loss(low[0], low[1], targets, GRID, eps=1e-6)["loss_bbox"]
    assert clamped < 0.1 * free


def test_quality_focal_is_zero_at_its_target() -> None:
    quality = torch.tensor([0.1, 0.5, 0.9])
    assert float(quality_focal(torch.logit(quality), quality).abs().max()) < 1e-7
    assert (quality_focal(torch.logit(quality) + 1, quality) > 0).all()


def test_distribution_focal_interpolates_between_two_bins() -> None:
    rows = torch.randn(1, 6, generator=torch.Generator().manual_seed(1))
    log_p = rows.log_softmax(-1)[0]
    found = distribution_focal(rows, torch.tensor([2.25]))
    torch.testing.assert_close(found, -(0.75 * log_p[2:3] + 0.25 * log_p[3:4]))


def test_decode_keeps_classes_apart_and_clips_to_the_content() -> None:
    boxes = torch.tensor([[[-5.0, 0.0, 20.0, 20.0], [-4.0, 0.0, 21.0, 20.0], [30.0, 30.0, 90.0, 99.0]]])
    scores = torch.tensor([[[0.9, 0.2], [0.8, 0.7], [0.01, 0.6]]])
    (found,) = decode(boxes, scores, [2, 1], torch.tensor([[40, 50]]))
    assert found.labels.tolist() == [0, 1, 1]
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])  # the second box of class 0 is suppressed
    assert found.boxes.tolist() == [[0, 0, 20, 20], [0, 0, 21, 20], [30, 30, 50, 40]]
    assert float(box_iou(found.boxes[1:2], found.boxes[2:])) == 0.0


def test_decode_multiplies_by_centerness_after_choosing() -> None:
    """mmdet 3.3.0: threshold and order within a level are those of the class score; NMS and output, of the product."""
    corner = torch.tensor([[0.0, 0], [30, 0], [60, 0]])
    boxes = torch.cat([corner, corner + 20], dim=1)[None]
    scores, centerness = torch.tensor([[[0.9], [0.5], [0.04]]]), torch.tensor([[0.05, 1.0, 1.0]])
    (found,) = decode(boxes, scores, [3], torch.tensor([[40, 90]]), centerness=centerness)
    assert found.scores.tolist() == pytest.approx([0.5, 0.045])
    assert found.boxes[:, 0].tolist() == [30, 0]
    (one,) = decode(boxes, scores, [3], torch.tensor([[40, 90]]), centerness=centerness, nms_pre=1)
    assert one.scores.tolist() == pytest.approx([0.045])


def test_decode_limits_levels_and_images() -> None:
    generator = torch.Generator().manual_seed(2)
    corner = torch.arange(40.0)[:, None].repeat(1, 2) * 10
    boxes = torch.cat([corner, corner + 8], dim=1)[None]
    scores = torch.rand(1, 40, 2, generator=generator)
    content = torch.tensor([[400, 400]])
    (found,) = decode(boxes, scores, [30, 10], content, score_thr=0.0, nms_pre=5, max_per_image=100)
    best = scores[0, :30].reshape(-1).topk(5).values.tolist() + scores[0, 30:].reshape(-1).topk(5).values.tolist()
    assert found.scores.tolist() == sorted(best, reverse=True)
    (few,) = decode(boxes, scores, [30, 10], content, score_thr=0.0, nms_pre=5, max_per_image=3)
    assert few.scores.tolist() == found.scores[:3].tolist()


def test_decode_drops_boxes_outside_the_content_and_low_scores() -> None:
    boxes = torch.tensor([[[60.0, 0.0, 90.0, 20.0], [0.0, 0.0, 9.0, 9.0]]])
    (found,) = decode(boxes, torch.tensor([[[0.9], [0.05]]]), [2], torch.tensor([[40, 50]]))
    assert len(found.boxes) == 0
    assert found.boxes.shape == (0, 4)
