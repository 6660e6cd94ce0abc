"""Batches and neck maps made by hand, for methods that read features alone: no detector, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdcli.geometry.grid import Grid
from kdcli.methods.base import Method, Pair
from kdcli.structures import Batch, Canvas, RowKey, Targets
from kdcli.tensors import Tensors, TensorSpec

GRID, CANVAS, CONTENT = Grid(), Canvas(96, 128), (60, 120)  # valid: 64 x 128
KEY = "features@all"
ONE = torch.tensor([[10.0, 12.0, 60.0, 50.0]])
TWO = torch.tensor([[10.0, 12.0, 60.0, 50.0], [70.0, 8.0, 118.0, 58.0]])
NONE = torch.zeros(0, 4)


def make_pair(ours: int = 8, theirs: int = 8) -> Pair:
    """Two nets of which only the neck's channels are known."""
    student, teacher = ({"features": TensorSpec("cell", (c,))} for c in (ours, theirs))
    return Pair(student, teacher, GRID, CANVAS, "gfl")


def make_batch(boxes: Sequence[Tensor], content: tuple[int, int] = CONTENT, canvas: Canvas = CANVAS) -> Batch:
    """A batch whose image i has ``boxes[i]``."""
    count = len(boxes)
    targets = Targets(
        boxes=list(boxes),
        labels=[torch.zeros(len(b), dtype=torch.int64) for b in boxes],
        content=torch.tensor([content] * count),
        canvas=canvas,
        assigned=torch.empty(count, 0, dtype=torch.int32),
        valid=torch.stack([GRID.valid(canvas, content)] * count),
        draws=torch.arange(count) + 7,
    )
    return Batch(torch.empty(0), targets, [RowKey(i, "identity") for i in range(count)])


def maps(images: int, channels: int = 8, seed: int = 0, canvas: Canvas = CANVAS) -> Tensor:
    """Random neck maps [B, P, C] with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, GRID.num_cells(canvas), channels, generator=generator).requires_grad_()


def run(method: Method, ours: Tensor, theirs: Tensor, batch: Batch) -> dict[str, Tensor]:
    """The terms of a method whose only need is the neck maps."""
    student: Tensors = {KEY: ours}
    terms: dict[str, Tensor] = method(student, {KEY: theirs}, batch)
    return terms


def number(value: Tensor) -> float:
    """A scalar tensor as a number, whether or not it has a gradient."""
    return value.detach().item()


def grad(value: Tensor) -> Tensor:
    """Its gradient, which must exist."""
    assert value.grad is not None
    return value.grad


def check_common(make: Any) -> None:
    """What every method on neck maps must do. ``make(pair)`` builds it."""
    for boxes in ([TWO, ONE], [NONE], [NONE, TWO], [ONE]):
        method, batch = make(make_pair()), make_batch(boxes)
        ours, theirs = maps(len(boxes), seed=1), maps(len(boxes), seed=2)
        terms = run(method, ours, theirs, batch)
        for part, term in terms.items():
            assert term.shape == (), part
            assert term.dtype == torch.float32
            assert torch.isfinite(term)
            assert term.requires_grad  # for an empty image too: under DDP no parameter may go unused
            assert method.active(batch, part) == bool(term != 0), part
            assert hasattr(method, method.weight_option(part)) or method.weight_option(part).endswith("_weight")
        torch.stack(list(terms.values())).sum().backward()
        assert torch.isfinite(grad(ours)).all()
        assert grad(ours).abs().sum() > 0
        assert theirs.grad is None
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())
        # what lies outside the image is read on neither side
        outside = ~batch.targets.valid
        assert not grad(ours)[outside].any()
        changed = run(method, ours, torch.where(outside[..., None], 50.0, theirs), batch)
        assert {k: number(v) for k, v in changed.items()} == {k: number(v) for k, v in terms.items()}

    # other channels, and maps in bf16 as autocast leaves them
    method, batch = make(make_pair(6, 10)), make_batch([TWO, NONE])
    ours, theirs = maps(2, 6, 1), maps(2, 10, 2)
    torch.stack(list(run(method, ours, theirs, batch).values())).sum().backward()
    assert grad(ours).abs().sum() > 0
    whole = run(method, ours, theirs, batch)
    rounded = run(method, ours.bfloat16(), theirs.bfloat16(), batch)
    for part, term in rounded.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, whole[part], rtol=0.03, atol=0)

    # neither the number of images nor their order changes a term; the transposed canvas works too
    method = make(make_pair())
    one, other = maps(1, seed=1), maps(1, seed=2)
    alone = run(method, one, other, make_batch([TWO]))
    many = run(method, one.repeat(3, 1, 1), other.repeat(3, 1, 1), make_batch([TWO] * 3))
    ours, theirs = maps(3, seed=1), maps(3, seed=2)
    before = run(method, ours, theirs, make_batch([TWO, NONE, ONE]))
    after = run(method, ours[[2, 0, 1]], theirs[[2, 0, 1]], make_batch([ONE, TWO, NONE]))
    for part in alone:
        torch.testing.assert_close(many[part], alone[part], rtol=1e-5, atol=0)
        torch.testing.assert_close(after[part], before[part], rtol=1e-5, atol=0)
    turned = make_batch([TWO[:, [1, 0, 3, 2]]], CONTENT[::-1], CANVAS.transposed)
    assert all(torch.isfinite(t) for t in run(method, one, other, turned).values())
