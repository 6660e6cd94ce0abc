"""The examples of docs/extending.md: losses against hand calculations, halves of a batch against the whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.geometry.assign import assign
from kdcli.methods.base import Pair
from kdcli.structures import Batch, Canvas, Entries, RowKey, Targets
from kdcli.tensors import BOX_DISTRIBUTION, CLS_LOGITS, TensorSpec
from tests.support.own_parts import MY_DETECTOR, MY_METHOD
from tests.support.small_runs import CANVAS


def module_of(path: Path) -> Any:
    """An example as a plain module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _batch(grid: Any, spec: Any, boxes: list[torch.Tensor]) -> Batch:
    canvas, content = Canvas.parse(CANVAS), (60, 90)
    assigned = torch.stack([assign(spec, grid, canvas, b, content) for b in boxes])
    valid = grid.valid(canvas, content).repeat(len(boxes), 1)
    sizes = torch.tensor([content] * len(boxes))
    labels = [torch.zeros(len(b), dtype=torch.int64) for b in boxes]
    targets = Targets(
        boxes=boxes, labels=labels, content=sizes, canvas=canvas, assigned=assigned, valid=valid
    )  # fmt: skip
    image, index = torch.nonzero(assigned >= 0, as_tuple=True)
    flag = torch.ones_like(index, dtype=torch.uint8)
    entries = Entries(index, flag, assigned[image, index].long(), torch.zeros(len(index)), image)
    return Batch(torch.empty(0), targets, [RowKey(i, "identity") for i in range(len(boxes))], entries)


BOXES = [torch.tensor([[8.0, 8.0, 40.0, 44.0]]), torch.tensor([[20.0, 10.0, 88.0, 58.0], [2.0, 30.0, 30.0, 58.0]])]


def test_the_example_detector_is_what_it_says() -> None:
    module = module_of(MY_DETECTOR)
    recipe = module.VARIFOCAL
    batch = _batch(recipe.grid, recipe.assigner, BOXES)
    total = recipe.grid.num_total(batch.targets.canvas)
    logits = torch.randn(2, total, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    edges = torch.randn(2, total, 4, 17, generator=torch.Generator().manual_seed(1)).requires_grad_()
    outputs = {CLS_LOGITS: logits, BOX_DISTRIBUTION: edges}
    terms = module.loss(outputs, batch.targets, recipe.grid)
    torch.stack(list(terms.values())).sum().backward()
    assert logits.grad is not None
    assert edges.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert edges.grad.any()
    # by hand: p = 0.8 against an IoU of 0.6, and p = 0.3 of a negative
    p = torch.tensor([0.8, 0.3])
    found = module.varifocal(torch.logit(p), torch.tensor([0.6, 0.0]))
    by_hand = [0.6 * (0.6 * 0.2231436 + 0.4 * 1.6094379), 0.75 * 0.09 * 0.3566749]
    assert found.tolist() == pytest.approx(by_hand, rel=1e-5)
    nothing = module.loss(outputs, _batch(recipe.grid, recipe.assigner, [torch.zeros(0, 4)] * 2).targets, recipe.grid)
    assert nothing["loss_bbox"] == 0
    assert nothing["loss_bbox"].requires_grad
    assert nothing["loss_cls"] > 0


@pytest.mark.parametrize("scope", ["all", "positives"])
def test_the_example_method_is_what_it_says(scope: str) -> None:
    module, recipe = module_of(MY_METHOD), module_of(MY_DETECTOR).VARIFOCAL
    specs = [{"features": TensorSpec("cell", (c,))} for c in (3, 5)]
    batch = _batch(recipe.grid, recipe.assigner, BOXES)
    method = module.Hint(Pair(*specs, recipe.grid, batch.targets.canvas, "varifocal"), weight=2.0, scope=scope)
    (need,) = method.needs
    assert module.Hint.reads({"scope": scope}) == method.needs
    assert need.dense == (scope == "all")
    assert batch.entries is not None
    cells = recipe.grid.num_cells(batch.targets.canvas)
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, cells, c, generator=generator).requires_grad_() for c in (3, 5)]
    ours, theirs = maps if need.dense else [m[batch.entries.image, batch.entries.index] for m in maps]
    (loss,) = method({need.key: ours}, {need.key: theirs}, batch).values()
    loss.backward()
    assert maps[1].grad is None
    assert all(p.grad is not None for p in method.parameters())

    adapted = maps[0].detach() @ method.adapter.weight.detach().T
    errors = (adapted - maps[1].detach()).square().mean(dim=-1)
    mask = batch.targets.valid if need.dense else batch.targets.assigned >= 0
    assert 0 < mask.sum() < mask.numel()
    assert loss.item() == pytest.approx(2 * errors[mask].mean().item(), rel=1e-6)

    # as two processes with an image each: the mean of their losses is the loss of both images
    parts, half = [], mask.sum() / 2
    module.world_mean = lambda count: half
    for i in range(2):
        one = _batch(recipe.grid, recipe.assigner, BOXES[i : i + 1])
        assert one.entries is not None
        assert method.active(one, "loss")
        place = torch.zeros_like(one.entries.index), one.entries.index
        mine, its = (m[i : i + 1] if need.dense else m[i : i + 1][place] for m in maps)
        parts.append(method({need.key: mine}, {need.key: its}, one)["loss"].item())
    assert sum(parts) / 2 == pytest.approx(loss.item(), rel=1e-6)

    empty = _batch(recipe.grid, recipe.assigner, [torch.zeros(0, 4)])
    assert method.active(empty, "loss") == need.dense
    same = module.Hint(Pair(specs[0], specs[0], recipe.grid, batch.targets.canvas, "gfl"), weight=0.0, scope=scope)
    assert list(same.parameters()) == []
    assert same({}, {}, batch) == {}
