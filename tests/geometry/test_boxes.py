"""Box arithmetic against torchvision, and codings against their inverses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision import ops

from kdcli.geometry.boxes import (
    aligned_ciou,
    aligned_giou,
    aligned_iou,
    decode_deltas,
    decode_distances,
    encode_deltas,
    encode_distances,
    pairwise_iou,
)


def random_boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 200
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 150], dim=1)


def test_pairwise_overlaps_agree_with_torchvision() -> None:
    a, b = random_boxes(7, 0), random_boxes(50, 1)
    torch.testing.assert_close(pairwise_iou(a, b), ops.box_iou(a, b))
    assert pairwise_iou(a[:0], b).shape == (0, 50)


def test_aligned_overlaps_agree_with_torchvision() -> None:
    a, b = random_boxes(40, 2), random_boxes(40, 3)
    torch.testing.assert_close(aligned_iou(a, b), ops.box_iou(a, b).diagonal())
    torch.testing.assert_close(aligned_giou(a, b), ops.generalized_box_iou(a, b).diagonal())


def test_ciou_agrees_with_torchvision() -> None:
    a, b = random_boxes(60, 8).requires_grad_(), random_boxes(60, 9)
    twin = a.detach().clone().requires_grad_()
    ours, theirs = 1 - aligned_ciou(a, b), ops.complete_box_iou_loss(twin, b, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(a.grad, twin.grad, rtol=1e-5, atol=1e-9)


def test_ciou_of_equal_boxes_is_one() -> None:
    box = torch.tensor([[3.0, 4.0, 30.0, 50.0]], requires_grad=True)
    overlap = aligned_ciou(box, box.detach())
    overlap.sum().backward()
    assert float(overlap.detach()) == pytest.approx(1)
    assert box.grad is not None
    assert bool(box.grad.isfinite().all())


def test_ciou_by_hand() -> None:
    """Boxes of 4x2 and 2x4 from one corner: IoU 4/12, centres sqrt(2) apart in a hull of 4x4."""
    a, b = torch.tensor([[0.0, 0.0, 4.0, 2.0]]), torch.tensor([[0.0, 0.0, 2.0, 4.0]])
    v = 4 / math.pi**2 * (math.atan(0.5) - math.atan(2)) ** 2
    alpha = v / (1 - 1 / 3 + v)
    assert float(aligned_ciou(a, b)) == pytest.approx(1 / 3 - 2 / 32 - alpha * v, abs=1e-6)


def test_giou_has_a_gradient_where_boxes_are_apart() -> None:
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0]], requires_grad=True)
    (1 - aligned_giou(a, torch.tensor([[10.0, 0.0, 12.0, 2.0]]))).sum().backward()
    assert a.grad is not None
    assert a.grad[0, 2] < 0  # moving the right edge towards the other box helps


@pytest.mark.parametrize("stds", [(1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)])
def test_deltas_round_trip(stds: tuple[float, float, float, float]) -> None:
    anchors, boxes = random_boxes(30, 4), random_boxes(30, 5)
    deltas = encode_deltas(anchors, boxes, stds)
    torch.testing.assert_close(decode_deltas(anchors, deltas, stds), boxes)
    torch.testing.assert_close(decode_deltas(anchors, deltas.expand(2, -1, -1), stds)[1], boxes)


def test_decoding_a_delta_clips_the_side() -> None:
    anchor = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    box = decode_deltas(anchor, torch.tensor([[0.0, 0.0, 50.0, 0.0]]), (1.0, 1.0, 1.0, 1.0))
    assert math.isclose(float(box[0, 2] - box[0, 0]), 625.0, rel_tol=1e-5)


def test_distances_round_trip() -> None:
    boxes, centers = random_boxes(20, 6), random_boxes(20, 7)[:, :2]
    torch.testing.assert_close(decode_distances(centers, encode_distances(centers, boxes)), boxes)
