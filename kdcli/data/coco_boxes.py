"""The boxes of a split at once, as masks over its annotations: beyond the border, too thin, of an impossible area."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcli.data.coco_index import Annotations

MIN_SIDE = 1.0  # image pixels: a thinner box is never trained on
MAX_OVER = 2.0  # pixels over the border that still count as rounding

Mask = NDArray[np.bool_]  # [M]


def clip_xyxy(xywh: NDArray[np.float64], height: int | NDArray[Any], width: int | NDArray[Any]) -> NDArray[np.float64]:
    """Boxes [M, 4] xywh -> [M, 4] xyxy clipped to ``height`` x ``width`` (one size, or one for each box)."""
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    limits = np.stack([width, height, width, height], axis=-1)  # [4] or [M, 4]
    clipped: NDArray[np.float64] = np.minimum(np.maximum(corners, 0.0), limits)
    return clipped


def owners(notes: Annotations) -> NDArray[np.int64]:
    """The image [M] of every box."""
    return np.repeat(np.arange(len(notes.image_ids)), np.diff(notes.box_offsets))


def borders(notes: Annotations) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Height [M] and width [M] of every box's image."""
    owner = owners(notes)
    return notes.heights[owner], notes.widths[owner]


def outside(notes: Annotations) -> Mask:
    """Boxes that lie wholly outside of their image."""
    height, width = borders(notes)
    x, y, w, h = notes.boxes_xywh.T
    # [0, 0, 0, 0] is not outside but thin: exporters write it for an object without a box
    found: Mask = (x >= width) | (y >= height) | ((x + w <= 0) & (x < 0)) | ((y + h <= 0) & (y < 0))
    return found


def pixels_over(notes: Annotations) -> NDArray[np.float64]:
    """By how many pixels [M] each box runs over the border where it does most; negative inside."""
    height, width = borders(notes)
    x, y, w, h = notes.boxes_xywh.T
    over: NDArray[np.float64] = np.maximum.reduce([-x, -y, x + w - width, y + h - height])
    return over


def thin(notes: Annotations) -> Mask:
    """Boxes that `Dataset.training_boxes` drops: a side under 1 pixel once clipped."""
    height, width = borders(notes)
    xyxy = clip_xyxy(notes.boxes_xywh, height, width)
    found: Mask = np.minimum(xyxy[:, 2] - xyxy[:, 0], xyxy[:, 3] - xyxy[:, 1]) < MIN_SIDE
    return found


def relative(notes: Annotations) -> Mask:
    """Boxes whose four numbers all lie within 0..1, as shares of width and height do."""
    x, y, w, h = notes.boxes_xywh.T
    found: Mask = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1) & (w > 0) & (w <= 1) & (h > 0) & (h <= 1)
    return found


def fits_as_corners(notes: Annotations) -> Mask:
    """Boxes that lie inside their image if they are read as x1, y1, x2, y2."""
    height, width = borders(notes)
    x1, y1, x2, y2 = notes.boxes_xywh.T
    low, high = -MAX_OVER, MAX_OVER
    found: Mask = (x1 >= low) & (y1 >= low) & (x2 > x1) & (y2 > y1) & (x2 <= width + high) & (y2 <= height + high)
    return found


def impossible_area(notes: Annotations) -> Mask:
    """Boxes whose ``area`` cannot be: none or less, or more than their image, or more than twice their box.

    A mask has at most its box. The pixel a side and the factor 2 leave room for tools that count pixels with both ends, or
    round the box.
    """
    height, width = borders(notes)
    w, h = notes.boxes_xywh[:, 2:].T
    area, own = notes.area, w * h
    nothing = (area < 0) | ((area == 0) & (w >= MIN_SIDE) & (h >= MIN_SIDE))
    large = (area > height.astype(np.float64) * width) | (area > 2 * (np.maximum(w, 0) + 1) * (np.maximum(h, 0) + 1))
    found: Mask = (nothing | large) & (area != own)  # the box's own is what exporters without masks write
    return found


def usable_area(notes: Annotations) -> NDArray[np.float64]:
    """The ``area`` [M] that AP by size goes by: the file's, or that of the box where the file's cannot be."""
    own = np.maximum(notes.boxes_xywh[:, 2:], 0).prod(axis=1)
    return np.where(impossible_area(notes), own, notes.area)
