"""Views: names, orientation, sizes, pixels and boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli.data.views import (
    PAD_RGB,
    Geometry,
    format_views,
    orient,
    parse_views,
    render,
    to_canvas,
    to_image,
    view_geometry,
)
from kdcli.errors import DataError, OptionError, StoreError
from kdcli.structures import Canvas

CANVASES = st.builds(Canvas, *(st.integers(1, 42).map(lambda n: 32 * n) for _ in range(2)))
SIDES = st.integers(1, 3000)
VIEWS = st.sampled_from(["identity", "hflip", "crop-0", "crop-3", "scale-0", "scale-1"])


def test_view_names() -> None:
    assert parse_views("identity") == ("identity",)
    assert parse_views("identity, hflip,crop-2") == ("identity", "hflip", "crop-0", "crop-1")
    assert parse_views("scale-2,identity") == ("scale-0", "scale-1", "identity")


@pytest.mark.parametrize("text", ["identity", "hflip,identity", "crop-3,identity,scale-2,hflip", "scale-12"])
def test_names_of_views_there_and_back(text: str) -> None:
    assert format_views(parse_views(text)) == text  # in this order: a view is drawn by its place


@pytest.mark.parametrize("text", ["", "identity,", "hflp", "crop-0", "crop-", "crop--1", "crop", "identity,identity",
                                  "crop-2,crop-3", "scale", "scale-0", "scale-0.6", "scale-2,scale-1"])  # fmt: skip
def test_wrong_view_names(text: str) -> None:
    with pytest.raises(OptionError, match="view"):
        parse_views(text)


def test_unknown_views_have_no_geometry() -> None:
    with pytest.raises(OptionError, match="hflip"):
        view_geometry(Canvas(64, 64), 10, 10, "hflop", 0, 0)


def test_orientation_is_the_one_that_scales_more() -> None:
    canvas = Canvas(256, 320)
    assert orient(canvas, 480, 640) == canvas
    assert orient(canvas, 640, 480) == Canvas(320, 256)
    assert orient(canvas, 500, 500) == canvas
    assert orient(Canvas(320, 256), 500, 500) == Canvas(320, 256)


def test_published_size_up_to_padding() -> None:
    geometry = view_geometry(Canvas(800, 1344), 427, 640, "identity", 0, 0)
    assert geometry.content == (800, 1199)
    assert view_geometry(Canvas(800, 1344), 480, 640, "hflip", 0, 0).content == (800, 1067)


@given(canvas=CANVASES, height=SIDES, width=SIDES, view=VIEWS, seed=st.integers(0, 9))
def test_geometry_is_possible_and_survives_its_array(
    canvas: Canvas, height: int, width: int, view: str, seed: int
) -> None:
    geometry = view_geometry(canvas, height, width, view, seed, 7)
    assert Geometry.from_array(geometry.to_array()) == geometry  # which also checks that it is possible
    assert geometry.canvas in (canvas, canvas.transposed)
    room = [c - s for c, s in zip(geometry.canvas.size, geometry.content, strict=True)]
    if view.startswith("scale"):
        shares = [c / side for c, side in zip(geometry.content, geometry.canvas.size, strict=True)]
        assert 0.6 - 0.5 / min(geometry.canvas.size) <= max(shares) <= 1
    else:
        assert min(room) == 0
    if view.startswith("crop"):
        assert geometry == view_geometry(canvas, height, width, view, seed, 7)


def test_crops_are_fixed_for_ever() -> None:
    """Stores hold these numbers; another machine or another numpy must draw the same."""
    crops = [view_geometry(Canvas(320, 320), 480, 640, f"crop-{k}", 0, 139).crop for k in range(3)]
    assert crops == EXPECTED_CROPS
    shares = []
    for image_id in range(300):
        geometry = view_geometry(Canvas(320, 320), 480, 640, "crop-0", 1, image_id)
        x0, y0, x1, y1 = geometry.crop
        shares.append((x1 - x0) * (y1 - y0) / (480 * 640))
        assert 0.74 < (x1 - x0) / (y1 - y0) < 1.35
    assert min(shares) > 0.29
    assert max(shares) > 0.9
    assert min(shares) < 0.35


def test_sizes_are_fixed_for_ever() -> None:
    """Stores hold these numbers; short sides are those of multi-scale training, 480 to 800 of 800, evenly."""
    canvas = Canvas(800, 1344)
    drawn = [view_geometry(canvas, 480, 640, f"scale-{k}", 0, 139) for k in range(4)]
    assert [(g.content, g.flip) for g in drawn] == EXPECTED_SIZES
    many = [view_geometry(canvas, 480, 640, f"scale-{k}", 1, image) for image in range(200) for k in range(2)]
    shorts = np.array([g.content[0] for g in many])
    assert (shorts.min(), shorts.max()) >= (480, 790)
    assert shorts.max() <= 800
    assert abs(shorts.mean() - 640) < 10  # 3 deviations of the mean of 400 draws are 14 px, these are fixed
    assert 160 < sum(g.flip for g in many) < 240
    assert all(g.crop == (0, 0, 640, 480) and abs(g.content[1] / g.content[0] - 4 / 3) < 0.003 for g in many)


EXPECTED_SIZES = [((541, 721), False), ((769, 1026), False), ((659, 879), True), ((491, 655), True)]
EXPECTED_CROPS = [(163, 78, 583, 471), (161, 59, 636, 467), (13, 4, 298, 339)]


@settings(max_examples=300)
@given(
    canvas=CANVASES, height=SIDES, width=SIDES, view=VIEWS, corners=st.lists(st.floats(0, 1), min_size=4, max_size=4)
)
def test_boxes_there_and_back(canvas: Canvas, height: int, width: int, view: str, corners: list[float]) -> None:
    geometry = view_geometry(canvas, height, width, view, 0, 3)
    x0, y0, x1, y1 = geometry.crop  # a box inside the crop is not clipped
    (u0, u1), (v0, v1) = sorted(corners[:2]), sorted(corners[2:])
    box = torch.tensor([[x0 + u0 * (x1 - x0), y0 + v0 * (y1 - y0), x0 + u1 * (x1 - x0), y0 + v1 * (y1 - y0)]])
    there, _ = to_canvas(box, geometry)
    assert there.dtype == torch.float32
    assert bool((there[:, 0::2] <= geometry.content[1]).all() and (there[:, 1::2] <= geometry.content[0]).all())
    assert (to_image(there, geometry) - box).abs().max() < 0.01
    again, _ = to_canvas(to_image(there, geometry), geometry)
    assert (again - there).abs().max() < 0.01


@pytest.mark.parametrize("view", ["identity", "hflip", "crop-0", "crop-1", "scale-0", "scale-2"])
def test_a_box_follows_its_pixels(view: str) -> None:
    """A white rectangle is found on the canvas where its box says, within half a pixel of blur."""
    image = torch.zeros(3, 180, 260, dtype=torch.uint8)
    geometry = view_geometry(Canvas(128, 192), 180, 260, view, 0, 3)
    x0, y0, x1, y1 = geometry.crop
    box = [(2 * x0 + x1) // 3, (2 * y0 + y1) // 3, (x0 + 2 * x1) // 3, (y0 + 2 * y1) // 3]
    image[:, box[1] : box[3], box[0] : box[2]] = 255
    boxes, keep = to_canvas(torch.tensor([box]), geometry)
    canvas = render(image, geometry)[0].clone()
    canvas[geometry.content[0] :] = 0
    canvas[:, geometry.content[1] :] = 0
    ys, xs = torch.nonzero(canvas > 127, as_tuple=True)
    found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    assert keep.all()
    assert (boxes[0] - found).abs().max() <= 0.75


@pytest.mark.parametrize("size", [(97, 131), (300, 211), (20, 30)])
def test_flipping_before_or_after_is_bitwise_the_same(size: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = view_geometry(Canvas(96, 128), *size, "identity", 0, 0)
    flipped = view_geometry(Canvas(96, 128), *size, "hflip", 0, 0)
    height, width = plain.content
    first, second = render(image, plain), render(image, flipped)
    assert torch.equal(first[:, :height, :width].flip(-1), second[:, :height, :width])
    assert torch.equal(render(image.flip(-1), plain), second)


def test_padding_is_the_mean_and_lies_right_and_below() -> None:
    geometry = view_geometry(Canvas(64, 64), 10, 20, "identity", 0, 0)
    canvas = render(torch.zeros(3, 10, 20, dtype=torch.uint8), geometry)
    assert (canvas.shape, canvas.dtype) == ((3, 64, 64), torch.uint8)
    assert geometry.content == (32, 64)
    assert not canvas[:, :32].any()
    assert torch.equal(canvas[:, 32:], torch.tensor(PAD_RGB, dtype=torch.uint8)[:, None, None].expand(3, 32, 64))
    with pytest.raises(DataError, match="11x20"):
        render(torch.zeros(3, 11, 20, dtype=torch.uint8), geometry)


def test_what_a_whole_image_keeps() -> None:
    geometry = view_geometry(Canvas(64, 64), 128, 128, "identity", 0, 0)
    boxes, keep = to_canvas(torch.tensor([[0.0, 0, 2, 2], [0, 0, 1.9, 50], [-10, 120, 10, 140]]), geometry)
    assert keep.tolist() == [True, False, True]
    assert boxes[2].tolist() == [0, 60, 5, 64]


def test_what_a_crop_keeps() -> None:
    geometry = Geometry(100, 100, (20, 0, 60, 40), True, (64, 64), Canvas(64, 64))  # 1.6 canvas pixels a pixel
    inside = torch.tensor([[30.0, 10, 50, 30], [0, 0, 26.7, 10], [0, 0, 26.6, 10], [18.8, 0, 21.2, 40], [61, 0, 90, 9]])
    boxes, keep = to_canvas(inside, geometry)
    assert keep.tolist() == [True, True, False, False, False]  # 26 % and 24.8 % of the area; 1.9 px; outside
    assert boxes[0].tolist() == [16, 16, 48, 48]
    assert boxes[1].tolist() == pytest.approx([64 - 6.7 * 1.6, 0, 64, 16])


def test_no_boxes() -> None:
    geometry = view_geometry(Canvas(64, 64), 10, 20, "hflip", 0, 0)
    boxes, keep = to_canvas(torch.zeros(0, 4), geometry)
    assert (boxes.shape, keep.shape, to_image(boxes, geometry).shape) == ((0, 4), (0,), (0, 4))


@pytest.mark.parametrize(("position", "value"), [(0, 5.5), (4, 0), (6, 2), (7, 9999), (9, np.nan), (2, -1)])
def test_stored_views_are_checked(position: int, value: float) -> None:
    array = view_geometry(Canvas(64, 96), 50, 60, "crop-1", 0, 0).to_array()
    array[position] = value
    with pytest.raises(StoreError, match="stored view"):
        Geometry.from_array(array)
    with pytest.raises(StoreError, match="eleven"):
        Geometry.from_array(array[:10])
