"""Colours stay apart for colour-blind people, and drawings stay inside the picture."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from kdcli.report.colours import CHART_COLOURS, PALETTE, colour_of, contrast, text_on, to_rgb
from kdcli.report.draw import draw_detections, side_by_side

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
_VISION = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def _lab(colour: str, vision: str) -> NDArray[np.float64]:
    """CIELAB (D65) of a colour as it looks to people with this vision."""
    rgb = np.array(to_rgb(colour)) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(_VISION[vision]) @ linear, 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = np.array(to_xyz) @ seen / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", list(_VISION))
def test_every_two_colours_can_be_told_apart(vision: str) -> None:
    pairs = itertools.combinations(PALETTE, 2)
    nearest = min(float(np.linalg.norm(_lab(a, vision) - _lab(b, vision))) for a, b in pairs)
    assert nearest >= 16  # about 2.3 is just noticeable side by side


def test_text_on_colours_is_readable_and_charts_show_on_both_pages() -> None:
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert min(contrast(colour, text_on(colour)) for colour in PALETTE) >= 4.5
    assert min(contrast(colour, page) for colour in CHART_COLOURS for page in ("#FFFFFF", "#16181C")) >= 2
    assert colour_of(0) == colour_of(len(PALETTE))
    assert len(set(PALETTE)) == len(PALETTE)


def _grey(height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), 128, dtype=np.uint8)


def test_small_images_are_enlarged_and_the_image_is_not_touched() -> None:
    image = _grey(48, 64)
    drawn = draw_detections(image, np.array([[10, 10, 40, 30]]), ["cat"], [0.9], classes=["dog", "cat"])
    assert drawn.size == (512, 384)
    assert drawn.mode == "RGB"
    assert (image == 128).all()
    assert draw_detections(_grey(480, 640), np.zeros((0, 4)), [], []).size == (640, 480)
    pixels = np.asarray(drawn)
    assert (pixels[30 * 8 - 1, 200] == to_rgb(colour_of(1))).all()  # lower edge, in the colour of the second class
    assert (pixels[160, 200] == 128).all()  # boxes are not filled


def test_labels_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcli.report import draw

    strips: list[tuple[float, float, float, float]] = []
    label = draw._label

    def spy(*args: Any) -> tuple[float, float, float, float]:
        strips.append(label(*args))
        return strips[-1]

    monkeypatch.setattr(draw, "_label", spy)
    boxes = np.array([[0, 0, 20, 20], [300, 0, 320, 10], [0, 236, 9, 256], [290, 230, 320, 256], [-50, -50, 400, 400]])
    names = ["cat", "a name far too long for any picture of this size " * 3, "dog", "bird", "everything"]
    drawn = draw_detections(_grey(256, 320), boxes, names, np.linspace(0.2, 0.9, 5))
    assert len(strips) == 5
    assert all(0 <= x1 < x2 <= drawn.width and 0 <= y1 < y2 <= drawn.height for x1, y1, x2, y2 in strips)


def test_labels_of_coinciding_boxes_do_not_cover_each_other() -> None:
    box = [100, 100, 200, 180]
    one = np.asarray(draw_detections(_grey(256, 320), np.array([box]), ["cat"], [0.9], classes=["cat", "dog"]))
    boxes = np.array([box, box])
    two = np.asarray(draw_detections(_grey(256, 320), boxes, ["cat", "dog"], [0.9, 0.8], classes=["cat", "dog"]))
    one, two = one[:195], two[:195]  # above the boxes, where the best label is
    blue = (one == to_rgb(colour_of(0))).all(axis=2)
    assert blue.sum() > 500
    assert ((two == to_rgb(colour_of(0))).all(axis=2) & blue).sum() == blue.sum()


def test_ground_truth_has_no_scores() -> None:
    with_score = draw_detections(_grey(256, 320), np.array([[50, 60, 150, 160]]), ["cat"], [0.5])
    without = draw_detections(_grey(256, 320), np.array([[50, 60, 150, 160]]), ["cat"], None)
    blue = to_rgb(colour_of(0))
    assert (np.asarray(without) == blue).all(axis=2).sum() < (np.asarray(with_score) == blue).all(axis=2).sum()


def test_side_by_side_holds_every_picture_at_one_height() -> None:
    red, blue = Image.new("RGB", (100, 50), "#FF0000"), Image.new("RGB", (300, 300), "#0000FF")
    sheet = side_by_side([("teacher", red), ("a caption longer than its picture " * 9, blue)])
    pixels = np.asarray(sheet)
    reds = (pixels == (255, 0, 0)).all(axis=2)
    blues = (pixels == (0, 0, 255)).all(axis=2)
    assert reds.sum() == 600 * 300
    assert blues.sum() == 300 * 300
    assert reds.any(axis=1).sum() == blues.any(axis=1).sum() == 300
    assert sheet.width == 900 + 3 * 6
