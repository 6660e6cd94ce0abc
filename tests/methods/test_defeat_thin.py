"""DeFeat on a thinned background: the dense loss when all is kept, and unbiased when it is not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.geometry.defeat_mask import defeat_cells
from kdcli.geometry.regions import RegionSpec, compute_entries
from kdcli.methods.base import Method, method_options
from kdcli.methods.defeat import DeFeat
from kdcli.methods.defeat_thin import ROWS, DeFeatThin
from kdcli.methods.maps import MAPS
from kdcli.structures import OBJECT, SAMPLE, Batch, Entries
from tests.support.defeat_case import GFL, SCENE, data, halved, warm
from tests.support.method_case import CANVAS, CONTENT, NONE, detector_of, make_batch, pair_of

RETINANET = detector_of("retinanet")


def thinned(detector: Any, keep: float) -> Batch:
    """``SCENE`` with the entries of the thinned form."""
    batch, spec = make_batch(detector, SCENE), RegionSpec(keep=keep)
    parts = [
        compute_entries(frozenset({"object", "sample"}), spec, detector.grid, CANVAS, b, a, CONTENT)
        for b, a in zip(batch.targets.boxes, batch.targets.assigned, strict=True)
    ]
    return replace(batch, entries=Entries.collate(parts))


def rows_at(batch: Batch, value: Tensor, num_anchors: int) -> Tensor:
    entries = batch.entries
    assert entries is not None
    chosen = entries.select(ROWS.region)
    return value[entries.image[chosen], entries.index[chosen] // num_anchors]


@pytest.mark.parametrize("detector", [GFL, RETINANET], ids=["gfl", "retinanet"])
def test_all_cells_kept_is_the_dense_loss(detector: Any) -> None:
    batch = thinned(detector, 1.0)
    ours, theirs = data(batch)
    pair = pair_of(detector, detector)
    dense, thin = DeFeat(pair), DeFeatThin(pair, keep=1.0)
    warm(dense)
    thin.adapters.load_state_dict(dense.adapters.state_dict())
    rows = {ROWS.key: rows_at(batch, theirs[MAPS.key], detector.grid.num_anchors)}
    expected, found = dense(ours, theirs, batch), thin(ours, rows, batch)
    assert list(found) == list(expected)
    for part, term in expected.items():
        torch.testing.assert_close(found[part], term, rtol=1e-5, atol=0)


def drawn(batch: Batch, keep: float, generator: torch.Generator) -> Batch:
    """``batch`` with every foreground cell, and each background cell with probability ``keep``."""
    inside = torch.stack([defeat_cells(b, GFL.grid, CANVAS) for b in batch.targets.boxes])
    chosen = torch.rand(inside.shape, generator=generator) < keep
    flag = (inside * OBJECT + (~inside & chosen) * SAMPLE) * batch.targets.valid
    image, index = torch.nonzero(flag, as_tuple=True)
    flags = flag[image, index].to(torch.uint8)
    return replace(batch, entries=Entries(index, flags, torch.full_like(index, -1), torch.zeros(len(index)), image))


def test_the_thinned_loss_is_unbiased() -> None:
    keep, draws = 0.2, 200
    batch = make_batch(GFL, SCENE)
    ours, theirs = ({k: v.detach() for k, v in side.items()} for side in data(batch))
    dense, thin = DeFeat(pair_of(GFL, GFL)), DeFeatThin(pair_of(GFL, GFL), keep=keep)
    warm(dense)
    thin.adapters.load_state_dict(dense.adapters.state_dict())
    # on coarse levels half of the draws keep no cell at all: those count as 0, the rest for more
    generator, found = torch.Generator().manual_seed(7), []
    with torch.no_grad():
        expected = dense(ours, theirs, batch)
        for _ in range(draws):
            sparse = drawn(batch, keep, generator)
            terms = thin(ours, {ROWS.key: rows_at(sparse, theirs[MAPS.key], 1)}, sparse)
            torch.testing.assert_close(terms["object"], expected["object"], rtol=1e-5, atol=0)
            found.append(terms["background"])
    values = torch.stack(found)
    error = float(values.std()) / math.sqrt(draws)
    assert abs(float(values.mean() - expected["background"])) < 3 * error
    assert error < 0.03 * float(expected["background"])


def test_the_thinned_form_on_two_processes() -> None:
    batch = thinned(GFL, 0.3)
    ours, theirs = data(batch)
    rows = {ROWS.key: rows_at(batch, theirs[MAPS.key], 1)}
    method = DeFeatThin(pair_of(GFL, GFL), keep=0.3)
    warm(method)
    one, two = method(ours, rows, batch), halved(method, ours, rows, batch)
    for part, term in one.items():
        torch.testing.assert_close(two[part], term, rtol=1e-5, atol=0)


def test_the_thinned_form_reads_rows_of_the_teacher_and_maps_of_the_student() -> None:
    assert DeFeatThin.needs == (ROWS,)
    assert DeFeatThin.student_needs == (MAPS,)
    assert set(DeFeatThin.region_options) <= set(method_options(DeFeatThin))
    batch = thinned(GFL, 0.3)
    ours, theirs = data(batch)
    rows = {ROWS.key: rows_at(batch, theirs[MAPS.key], 1).requires_grad_()}
    method = DeFeatThin(pair_of(GFL, GFL), keep=0.3)
    terms = method(ours, rows, batch)
    torch.stack(list(terms.values())).sum().backward()
    gradient = ours[MAPS.key].grad
    assert gradient is not None
    assert not gradient[~batch.targets.valid].any()
    assert rows[ROWS.key].grad is None
    assert all(p.grad is not None for p in method.parameters())
    assert all(method.active(batch, part) for part in terms)
    assert [method.weight_option(part) for part in terms] == ["fg_weight", "bg_weight"]


def test_the_thinned_form_without_boxes_or_weights() -> None:
    batch = thinned(GFL, 0.3)
    ours, theirs = data(batch)
    rows = {ROWS.key: rows_at(batch, theirs[MAPS.key], 1)}
    assert set(DeFeatThin(pair_of(GFL, GFL), fg_weight=0)(ours, rows, batch)) == {"background"}
    assert DeFeatThin(pair_of(GFL, GFL), fg_weight=0, bg_weight=0)(ours, rows, batch) == {}
    empty = drawn(make_batch(GFL, [NONE] * 4), 0.3, torch.Generator().manual_seed(0))
    method = DeFeatThin(pair_of(GFL, GFL))
    terms = method(ours, {ROWS.key: rows_at(empty, theirs[MAPS.key], 1)}, empty)
    assert float(terms["object"].detach()) == 0
    assert terms["object"].requires_grad
    assert not method.active(empty, "object")
    assert method.active(empty, "background")


@pytest.mark.parametrize("method", [DeFeat, DeFeatThin])
def test_a_method_says_where_it_comes_from(method: type[Method]) -> None:
    assert "arXiv 2103.14475" in method.title
    assert method.__doc__ is not None
    assert all(f"``{option}``" in method.__doc__ for option in method_options(method))
    assert method.index_aligned == (method is DeFeatThin)  # its rows are found by anchor index
