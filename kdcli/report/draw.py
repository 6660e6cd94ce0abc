"""Drawings of detections: boxes with labels that stay inside the picture, and several images side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from kdcli.files import atomic_write_bytes
from kdcli.report.colours import colour_of, text_on
from kdcli.report.fonts import writable
from kdcli.report.text import plain

_LEGIBLE = 640  # pixels of the long side below which a picture is enlarged, so that 12-pixel labels do not cover it
_LARGEST_SCALE = 8
_Rect = tuple[float, float, float, float]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_detections(
    image: NDArray[np.uint8],
    boxes: NDArray[Any],
    labels: Sequence[str],
    scores: Sequence[float] | NDArray[Any] | None = None,
    *,
    classes: Sequence[str] = (),
) -> Image.Image:
    """Draw boxes on a copy of ``image`` [H, W, 3] uint8; a small image is enlarged by a whole factor first.

    ``boxes``: [D, 4] xyxy in pixels of ``image``; ``labels``: D class names; ``scores``: D values in 0..1, or None for
    ground truth. ``classes`` gives every class its colour by position, so that images of one data set agree; without
    it the names present are numbered in alphabetical order. The best scores are drawn last, on top.
    """
    scale = _scale(image)
    picture = Image.fromarray(image).convert("RGB")
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    line = max(3, round(max(picture.size) / 220))
    height = max(12, round(max(picture.size) / 45))
    order = list(classes) or sorted(set(labels))
    scaled = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale
    ranked = range(len(labels)) if scores is None else np.argsort(np.asarray(scores), kind="stable").tolist()
    colours = [colour_of(order.index(name)) for name in labels]
    rects = [_inside(box, picture.size) for box in scaled.tolist()]
    for i in ranked:
        _outline(pen, rects[i], colours[i], line)
    taken: list[_Rect] = []
    for i in reversed(ranked):  # the best label chooses its place first
        name, file = writable(plain(labels[i]))
        if name != plain(labels[i]):  # no font has it all: its number in the class list tells what it is
            name = f"{order.index(labels[i])} {name}"
        text = name if scores is None else f"{name} {float(scores[i]):.2f}"
        taken.append(_label(pen, text, rects[i], colours[i], _font(file, height), picture.size, taken))
    return picture


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Put images in a row, each under its caption, scaled to the height of the tallest."""
    height = max(picture.height for _, picture in panels)
    images = [_of_height(picture, height) for _, picture in panels]
    letters = max(14, height // 24)
    font = _font(None, letters)
    gap = max(6, height // 60)
    strip = _text_size(font, "Ag")[1] + 2 * gap
    width = sum(picture.width for picture in images) + gap * (len(images) + 1)
    sheet = Image.new("RGB", (width, height + strip + gap), "#FFFFFF")
    pen = ImageDraw.Draw(sheet)
    left = gap
    for (caption, _), picture in zip(panels, images, strict=True):
        name, file = writable(plain(caption))
        font = _font(file, letters)
        text = _fitted(name, font, picture.width)
        pen.text((left, strip // 2), text, fill="#000000", font=font, anchor="lm")
        sheet.paste(picture, (left, strip))
        left += picture.width + gap
    return sheet


def save_png(picture: Image.Image, path: Path) -> None:
    """Write ``picture`` to ``path`` whole or not at all. Raises NoSpaceError when the disk is full."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    atomic_write_bytes(path, data.getvalue())


def _font(file: str | None, height: int) -> Font:
    """The font of a file, or the usual one, of letters of ``height`` pixels."""
    return ImageFont.load_default(height) if file is None else ImageFont.truetype(file, height)


def _of_height(picture: Image.Image, height: int) -> Image.Image:
    """The picture scaled to ``height`` pixels."""
    width = max(1, round(picture.width * height / picture.height))
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _scale(image: NDArray[np.uint8]) -> int:
    """Whole factor that brings the long side of a small image to about 640 pixels."""
    longest = max(image.shape[:2])
    return min(_LARGEST_SCALE, -(-_LEGIBLE // longest)) if longest < _LEGIBLE else 1


def _inside(box: Sequence[float], size: tuple[int, int]) -> _Rect:
    """The box clipped to the picture, at least a pixel wide."""
    x1, x2 = (min(max(v, 0.0), size[0] - 1.0) for v in (box[0], box[2]))
    y1, y2 = (min(max(v, 0.0), size[1] - 1.0) for v in (box[1], box[3]))
    return (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))


def _outline(pen: ImageDraw.ImageDraw, rect: _Rect, colour: str, line: int) -> None:
    """A frame with a thin edge of the opposite lightness, to be seen on any background."""
    x1, y1, x2, y2 = rect
    edge = text_on(colour)
    pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=edge, width=line + 2)
    pen.rectangle(rect, outline=colour, width=line)


def _label(
    pen: ImageDraw.ImageDraw,
    text: str,
    rect: _Rect,
    colour: str,
    font: Font,
    size: tuple[int, int],
    taken: Sequence[_Rect],
) -> _Rect:
    """Write ``text`` on a filled strip above, inside or below ``rect``, where it covers other labels least."""
    pad = 3
    text = _fitted(text, font, size[0] - 2 * pad)
    text_width, text_height = _text_size(font, text)
    width, height = text_width + 2 * pad, text_height + 2 * pad
    left = min(max(rect[0], 0.0), size[0] - width)
    right = min(max(rect[2] - width, 0.0), size[0] - width)
    places = [(x, y) for x in (left, right) for y in (rect[1] - height, rect[1], rect[3], rect[3] - height)]
    inside = [(x, y) for x, y in places if y >= 0 and y + height <= size[1]] or [(left, 0.0)]
    x, y = min(inside, key=lambda place: sum(_overlap((*place, place[0] + width, place[1] + height), t) for t in taken))
    strip = (x, y, x + width, y + height)
    pen.rectangle(strip, fill=colour)
    pen.text((x + pad, y + height / 2), text, fill=text_on(colour), font=font, anchor="lm")
    return strip


def _overlap(a: _Rect, b: _Rect) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _text_size(font: Font, text: str) -> tuple[int, int]:
    """Width of ``text``, and the height of a line with ascenders and descenders, in pixels."""
    left, _, right, _ = font.getbbox(text)
    _, top, _, bottom = font.getbbox("Ågjp")
    return int(right - left) + 1, int(bottom - top) + 1


def _fitted(text: str, font: Font, width: int) -> str:
    """``text``, shortened with an ellipsis if it is wider than ``width`` pixels."""
    if _text_size(font, text)[0] <= width:
        return text
    while text and _text_size(font, text + "...")[0] > width:
        text = text[:-1]
    return text + "..."
