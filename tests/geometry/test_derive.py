"""Derived tensors: integral, decoded boxes, rank."""

from __future__ import annotations

import pytest
import torch

from kdcli.geometry.derive import decode_distribution, integral, rank


def test_integral_of_a_spike_is_its_bin() -> None:
    spike = torch.full((3, 4, 17), -100.0)
    spike[..., 5] = 100.0
    torch.testing.assert_close(integral(spike), torch.full((3, 4), 5.0))
    torch.testing.assert_close(integral(torch.zeros(2, 4, 17)), torch.full((2, 4), 8.0))


def test_integral_stays_in_float32_under_autocast() -> None:
    rows = torch.randn(50, 4, 17, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(integral(rows), integral(rows.clone()))
        inside = integral(rows)
    torch.testing.assert_close(inside, integral(rows), rtol=1e-6, atol=1e-6)
    assert inside.dtype == torch.float32


def test_decoded_box_is_in_pixels_around_its_centre() -> None:
    rows = torch.zeros(2, 4, 3)  # one stride on each side
    boxes = decode_distribution(rows, torch.tensor([[16.0, 24.0], [64.0, 0.0]]), torch.tensor([8.0, 64.0]))
    assert boxes.tolist() == [[8.0, 16.0, 24.0, 32.0], [0.0, -64.0, 128.0, 64.0]]


def test_rank_is_score_and_iou_with_a_gradient() -> None:
    logits = torch.tensor([[0.0, 3.0], [1.0, -1.0]], requires_grad=True)
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 2.0, 2.0]], requires_grad=True)
    truth = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 2.0]])
    found = rank(logits, boxes, truth, torch.tensor([1, 0]))
    assert found[:, 0].tolist() == pytest.approx([0.9525741, 0.7310586])
    assert found[:, 1].tolist() == pytest.approx([1.0, 0.5])
    found.sum().backward()
    assert logits.grad is not None
    assert boxes.grad is not None
    assert torch.equal(logits.grad != 0, torch.tensor([[False, True], [True, False]]))
    assert boxes.grad[1, 2] > 0
    assert rank(logits[:0], boxes[:0], truth[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, 2)
