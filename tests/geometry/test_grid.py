"""Grid: sizes, order, valid area, JSON."""

from __future__ import annotations

import json

import pytest
import torch

from kdcli.errors import OptionError
from kdcli.geometry.grid import Grid
from kdcli.structures import Canvas

RETINA = Grid(base_scale=4.0, scales=(1.0, 2 ** (1 / 3), 2 ** (2 / 3)), ratios=(0.5, 1.0, 2.0))


@pytest.mark.parametrize(("canvas", "cells"), [("800x1344", 22_400), ("320", 2_134), ("256x320", 1_706)])
def test_cells_are_known_and_equal_for_the_transpose(canvas: str, cells: int) -> None:
    size, grid = Canvas.parse(canvas), Grid()
    assert grid.num_cells(size) == cells == grid.num_cells(size.transposed)
    assert RETINA.num_total(size) == 9 * cells == sum(RETINA.level_sizes(size))


@pytest.mark.parametrize("grid", [Grid(), RETINA, Grid(offset=0.5)])
def test_anchors_lie_around_their_cells(grid: Grid) -> None:
    canvas = Canvas(96, 160)  # 96 / 128 and 160 / 64 are not whole: cells over the edge
    anchors, centers = grid.anchors(canvas), grid.centers(canvas)
    assert anchors.shape == (grid.num_total(canvas), 4)
    assert centers.shape == (grid.num_cells(canvas), 2)
    middle = (anchors[:, :2] + anchors[:, 2:]) / 2
    torch.testing.assert_close(middle, centers.repeat_interleave(grid.num_anchors, dim=0))
    sides = (anchors[:, 2:] - anchors[:, :2]).prod(dim=1).sqrt() / grid.anchor_strides(canvas)
    expected = torch.tensor(grid.scales, dtype=torch.float64).repeat(len(grid.ratios)) * grid.base_scale
    torch.testing.assert_close(sides.reshape(-1, grid.num_anchors), expected.expand(len(centers), -1))


def test_order_is_row_major_with_ratios_outside_scales() -> None:
    canvas = Canvas(64, 96)
    x, y = Grid(strides=(32,)).centers(canvas).unbind(1)
    assert x.tolist() == [0, 32, 64, 0, 32, 64]
    assert y.tolist() == [0, 0, 0, 32, 32, 32]
    width, height = (RETINA.anchors(canvas)[:9, 2:] - RETINA.anchors(canvas)[:9, :2]).unbind(1)
    torch.testing.assert_close(height / width, torch.tensor([0.5] * 3 + [1.0] * 3 + [2.0] * 3, dtype=torch.float64))
    assert (width[:3].diff() > 0).all()


def test_valid_is_the_content_rounded_up_to_32() -> None:
    canvas = Canvas(96, 128)
    grid = Grid(strides=(8, 64))
    valid = grid.valid(canvas, (33, 100))  # rounds up to 64 x 128
    fine, coarse = valid.split(grid.level_sizes(canvas))
    assert fine.reshape(12, 16)[:8].all()
    assert not fine.reshape(12, 16)[8:].any()
    assert coarse.reshape(2, 2).tolist() == [[True, True], [False, False]]
    assert grid.valid(canvas, (96, 128)).all()
    assert RETINA.valid_anchors(canvas, (33, 100)).sum() == 9 * RETINA.valid(canvas, (33, 100)).sum()


def test_tensors_are_made_once() -> None:
    canvas = Canvas(64, 64)
    assert Grid().anchors(canvas) is Grid().anchors(canvas)
    assert Grid().anchors(canvas, torch.float32).dtype == torch.float32
    assert Grid().anchors(canvas).dtype == torch.float64


@pytest.mark.parametrize("grid", [Grid(), RETINA, Grid(strides=(16, 32), offset=0.5)])
def test_json_round_trip(grid: Grid) -> None:
    assert Grid.from_json(json.loads(json.dumps(grid.to_json()))) == grid


def test_json_of_another_version_is_refused() -> None:
    with pytest.raises(OptionError, match=r"unknown field 'stride'.*'strides'"):
        Grid.from_json(Grid().to_json() | {"stride": 8})


def test_json_without_a_field_takes_its_default() -> None:
    grid = Grid(base_scale=4.0)
    assert Grid.from_json({k: v for k, v in grid.to_json().items() if k != "offset"}) == grid


@pytest.mark.parametrize("bad", [{"strides": ()}, {"scales": ()}, {"strides": (8, -1)}, {"ratios": (0.0,)}])
def test_impossible_grids_are_refused(bad: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(OptionError):
        Grid(**bad)  # type: ignore[arg-type]
