"""A view is one geometry of an image: crop, resize, flip and canvas, as plain numbers that are stored and replayed.

Pipeline: crop -> resize (antialiased, size = int(side * scale + 0.5)) -> flip -> place top-left -> pad. Boxes follow
the actual ratio of each axis, so that they fit the resized pixels and not the ideal scale; a flip mirrors about the
content width. Views are ``identity``, ``hflip``, ``crop-0``, ``crop-1``, ... (random resized crops) and ``scale-0``,
``scale-1``, ... (the whole image at a random size, mirrored or not); the random ones depend on the seed and the image
alone.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from kdcli.errors import DataError, OptionError, StoreError, did_you_mean
from kdcli.limits import MAX_VIEWS
from kdcli.structures import Canvas

PAD_RGB = (124, 116, 104)  # round(255 * ImageNet mean), so that padding is 0 after normalisation
CROP_AREA = (0.3, 1.0)  # share of the image area
CROP_RATIO = (3 / 4, 4 / 3)  # width / height
CROP_TRIES = 10
CROP_MIN_VISIBLE = 0.25  # share of a box's area that must remain in the crop
SCALE_RANGE = (0.6, 1.0)  # of the size that fits: short side 480 to 800 on a canvas of 800x1344 (mmdet's multi-scale)
WHOLE = re.compile("0*[1-9][0-9]*")
NUMBERED = ("crop", "scale")  # views that come in any number
CROP_MIN_SIDE = 2.0  # canvas pixels, of a box in a crop
MIN_SIDE = 1.0  # canvas pixels, of a box in the whole image


@dataclass(frozen=True)
class Geometry:
    """Everything that is needed to replay a view: pixels in, canvas pixels out."""

    height: int  # of the image
    width: int
    crop: tuple[int, int, int, int]  # x0, y0, x1, y1 in image pixels; the whole image without a crop
    flip: bool
    content: tuple[int, int]  # (height, width) of the resized crop on the canvas
    canvas: Canvas  # already in the orientation of this view

    @property
    def cropped(self) -> bool:
        """True when the view does not show the whole image."""
        return self.crop != (0, 0, self.width, self.height)

    @property
    def ratio(self) -> tuple[float, float]:
        """Canvas pixels per image pixel along (x, y); they differ a little because the content is whole pixels."""
        x0, y0, x1, y1 = self.crop
        return self.content[1] / (x1 - x0), self.content[0] / (y1 - y0)

    def to_array(self) -> NDArray[np.float64]:
        """Eleven whole numbers: image h w, crop x0 y0 x1 y1, flip, content h w, canvas h w."""
        return np.array(
            [self.height, self.width, *self.crop, self.flip, *self.content, *self.canvas.size], dtype=np.float64
        )

    @staticmethod
    def from_array(array: NDArray[Any]) -> Geometry:
        """Read what `to_array` wrote. Raises StoreError when the numbers cannot be a view."""
        values = np.asarray(array, dtype=np.float64)
        if values.shape != (11,) or not np.isfinite(values).all() or (values != np.floor(values)).any():
            raise StoreError(f"a stored view is not eleven whole numbers: {values.tolist()}; run kdcli cache verify")
        h, w, x0, y0, x1, y1, flip, ch, cw, canvas_h, canvas_w = (int(v) for v in values)
        if not (
            0 <= x0 < x1 <= w and 0 <= y0 < y1 <= h and 0 < ch <= canvas_h and 0 < cw <= canvas_w and flip in (0, 1)
        ):
            raise StoreError(f"a stored view is impossible: {values.tolist()}; run kdcli cache verify")
        return Geometry(h, w, (x0, y0, x1, y1), bool(flip), (ch, cw), Canvas(canvas_h, canvas_w))


def parse_views(text: str) -> tuple[str, ...]:
    """Names of the views that ``text`` asks for: ``"identity,hflip,crop-2"`` -> identity, hflip, crop-0, crop-1.

    ``crop-K`` stands for K crops, ``scale-K`` for K sizes. Raises OptionError for an unknown word, a repetition or an
    empty list.
    """
    names: list[str] = []
    for word in (part.strip() for part in text.split(",")):
        kind, dash, count = word.partition("-")
        if word in ("identity", "hflip"):
            added = [word]
        elif kind in NUMBERED and dash and WHOLE.fullmatch(count):
            if len(count) > len(str(MAX_VIEWS)) or int(count) + len(names) > MAX_VIEWS:
                raise OptionError(f"views '{text}': an image has at most {MAX_VIEWS:,} views")
            added = [f"{kind}-{k}" for k in range(int(count))]
        else:
            fix = did_you_mean(word, ("identity", "hflip", "crop-1", "crop-4", "scale-8"))
            raise OptionError(
                f"views '{text}': unknown view '{word}'{fix} (crop-K stands for K >= 1 crops, scale-K for K sizes)"
            )
        if set(added) & set(names):
            raise OptionError(f"views '{text}': '{word}' is asked for twice; name every view once")
        names += added
    return tuple(names)


def format_views(names: Sequence[str]) -> str:
    """The inverse of ``parse_views``: identity, crop-0, crop-1 -> ``"identity,crop-2"``."""
    kinds = [name.partition("-")[0] for name in names]
    counts = {kind: kinds.count(kind) for kind in kinds}  # in the order of their first view
    return ",".join(f"{kind}-{count}" if kind in NUMBERED else kind for kind, count in counts.items())


def orient(canvas: Canvas, height: int, width: int) -> Canvas:
    """The orientation of ``canvas`` that scales a ``height`` x ``width`` picture more; a square keeps the given one."""
    # min(H/h, W/w) of both orientations, multiplied by h*w: whole numbers, so that no rounding decides
    given = min(canvas.height * width, canvas.width * height)
    turned = min(canvas.width * width, canvas.height * height)
    return canvas.transposed if turned > given else canvas


def view_geometry(canvas: Canvas, height: int, width: int, view: str, seed: int, image_id: int) -> Geometry:
    """The geometry of one view of one image: a pure function of its arguments, equal on every machine.

    ``height``, ``width``: image pixels. ``seed`` and ``image_id`` matter to crops and sizes only. Raises OptionError for
    an unknown view name.
    """
    crop, flip, share = (0, 0, width, height), view == "hflip", 1.0
    if view.startswith("crop-"):
        crop = _random_crop(height, width, _uniform(f"{seed}/{image_id}/{view}"))
    elif view.startswith("scale-"):
        draw = _uniform(f"{seed}/{image_id}/{view}")
        share, flip = draw(*SCALE_RANGE), draw(0, 1) < 0.5
    elif view not in ("identity", "hflip"):
        raise OptionError(f"unknown view '{view}'{did_you_mean(view, ('identity', 'hflip', 'crop-0'))}")
    side_w, side_h = crop[2] - crop[0], crop[3] - crop[1]
    oriented = orient(canvas, side_h, side_w)
    scale = min(oriented.height / side_h, oriented.width / side_w) * share
    # 1 px at least: a 3000 x 4 strip on a small canvas would round to nothing
    content = (max(1, int(side_h * scale + 0.5)), max(1, int(side_w * scale + 0.5)))
    return Geometry(height, width, crop, flip, content, oriented)


def render(image: Tensor, geometry: Geometry) -> Tensor:
    """Draw ``image`` [3, h, w] uint8 on its canvas: [3, H, W] uint8. Raises DataError for another image size."""
    if tuple(image.shape[-2:]) != (geometry.height, geometry.width):
        found = f"{image.shape[-2]}x{image.shape[-1]}"
        raise DataError(f"the image is {found} but its view was made for {geometry.height}x{geometry.width}")
    x0, y0, x1, y1 = geometry.crop
    content = image[:, y0:y1, x0:x1]
    if tuple(content.shape[-2:]) != geometry.content:
        content = tvf.resize(content, list(geometry.content), InterpolationMode.BILINEAR, antialias=True)
    if geometry.flip:
        content = content.flip(-1)
    canvas = torch.tensor(PAD_RGB, dtype=torch.uint8)[:, None, None].repeat(1, *geometry.canvas.size)
    canvas[:, : geometry.content[0], : geometry.content[1]] = content
    return canvas


def to_canvas(boxes: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Boxes of the image as boxes of the view.

    ``boxes`` [G, 4] xyxy image pixels -> ([G, 4] float32 xyxy canvas pixels, clipped to the content; keep [G] bool).
    A box of a crop is kept when at least 25 % of its area and 2 canvas pixels a side remain; a box of the whole image
    when 1 canvas pixel a side remains. What is not kept is background.
    """
    (ratio_x, ratio_y), (x0, y0, _, _) = geometry.ratio, geometry.crop
    height, width = geometry.content
    # in numpy: 0.03 ms for the boxes of an image, where torch takes 0.10
    whole = boxes.numpy().astype(np.float64).reshape(-1, 4) - (x0, y0, x0, y0)
    whole *= (ratio_x, ratio_y, ratio_x, ratio_y)
    clipped = np.minimum(np.maximum(whole, 0.0), np.array([width, height, width, height], np.float64))
    sides = clipped[:, 2:] - clipped[:, :2]
    if geometry.cropped:
        area = (whole[:, 2:] - whole[:, :2]).prod(axis=1)
        keep = (sides >= CROP_MIN_SIDE).all(axis=1) & (sides.prod(axis=1) >= CROP_MIN_VISIBLE * area)
    else:
        keep = (sides >= MIN_SIDE).all(axis=1)
    if geometry.flip:
        clipped[:, 0], clipped[:, 2] = width - clipped[:, 2], width - clipped[:, 0]
    return torch.from_numpy(clipped.astype(np.float32)), torch.from_numpy(keep)


def to_image(boxes: Tensor, geometry: Geometry) -> Tensor:
    """The inverse of `to_canvas`: [D, 4] xyxy canvas pixels -> [D, 4] float32 xyxy image pixels, clipped."""
    unflipped = boxes.to(torch.float64).reshape(-1, 4)
    if geometry.flip:
        x1, y1, x2, y2 = unflipped.unbind(dim=1)
        unflipped = torch.stack([geometry.content[1] - x2, y1, geometry.content[1] - x1, y2], dim=1)
    ratio_x, ratio_y = geometry.ratio
    x0, y0, _, _ = geometry.crop
    image = unflipped / torch.tensor([ratio_x, ratio_y, ratio_x, ratio_y], dtype=torch.float64, device=boxes.device)
    image = image + torch.tensor([x0, y0, x0, y0], dtype=torch.float64, device=boxes.device)
    xs, ys = image[:, 0::2].clamp(0, geometry.width), image[:, 1::2].clamp(0, geometry.height)
    return torch.stack([xs, ys], dim=2).flatten(1).to(torch.float32)


def _uniform(key: str) -> Callable[[float, float], float]:
    """Uniform numbers named by ``key``. The raw Philox stream is fixed; numpy may change its own distributions."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(digest, "little"))

    def draw(low: float, high: float) -> float:
        return low + (high - low) * ((int(bits.random_raw()) >> 11) * 2.0**-53)

    return draw


def _random_crop(height: int, width: int, draw: Callable[[float, float], float]) -> tuple[int, int, int, int]:
    """A box of 30-100 % of the area and ratio 3/4-4/3, as in torchvision's RandomResizedCrop; x0 y0 x1 y1, pixels."""
    for _ in range(CROP_TRIES):
        area = height * width * draw(*CROP_AREA)
        ratio = math.exp(draw(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = int(math.sqrt(area * ratio) + 0.5), int(math.sqrt(area / ratio) + 0.5)
        if 0 < w <= width and 0 < h <= height:
            x0, y0 = int(draw(0, width - w + 1)), int(draw(0, height - h + 1))
            return x0, y0, x0 + w, y0 + h
    # a long strip holds no such box: the largest one of the nearest ratio, in the middle
    w, h = min(width, int(height * CROP_RATIO[1] + 0.5)), min(height, int(width / CROP_RATIO[0] + 0.5))
    x0, y0 = (width - w) // 2, (height - h) // 2
    return x0, y0, x0 + w, y0 + h
