"""One view of one image, as the teacher saw it: pixels and boxes there and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from kdcli.api.arguments import as_boxes
from kdcli.data import views
from kdcli.data.images import read_image, to_rgb
from kdcli.data.views import Geometry
from kdcli.errors import DataError, OptionError, StoreError
from kdcli.structures import Canvas, RowKey


@dataclass(frozen=True)
class StoreView:
    """Where the pixels of an image went on the teacher's canvas: crop, resize, flip, padding, as the store recorded them."""

    key: RowKey
    geometry: Geometry
    content_sha256: str  # of the image file that the teacher saw
    exif: bool = True  # EXIF orientations are applied where the annotated size allows; not in every store

    @property
    def canvas(self) -> Canvas:
        """The canvas in the orientation of this view."""
        return self.geometry.canvas

    @property
    def content(self) -> tuple[int, int]:
        """(height, width) of the image's own pixels on the canvas, from its top left; the rest is padding."""
        return self.geometry.content

    def render(self, image: Tensor | NDArray[np.uint8] | Image.Image) -> Tensor:
        """The teacher's pixels of a decoded image: [3, H, W] uint8, RGB, bit for bit what the teacher saw.

        ``image``: a Pillow image (its EXIF orientation is followed where the annotations do), an array [h, w, 3] or a
        tensor [3, h, w], both uint8 RGB and turned already. Raises DataError for another size, shape or number type,
        OptionError for a path or anything else.
        """
        if isinstance(image, Image.Image):
            pixels: Any = to_rgb(image, (self.geometry.height, self.geometry.width), f"of {self.key}", self.exif)
        else:
            pixels = image
        if isinstance(pixels, np.ndarray):
            if pixels.ndim != 3 or pixels.shape[2] != 3:
                raise DataError(f"{self.key}: an array of shape {list(pixels.shape)} is no image; give [h, w, 3], RGB")
            pixels = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).contiguous()
        if not isinstance(pixels, Tensor):
            raise OptionError(
                f"{self.key}: render takes an array, a PIL image or a tensor, not {type(pixels).__name__}; a file is for "
                "load(path)"
            )
        if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != torch.uint8:
            raise DataError(
                f"{self.key}: {str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)} is no image; give uint8 RGB, "
                "[3, h, w] as a tensor or [h, w, 3] as an array"
            )
        return views.render(pixels.cpu(), self.geometry)

    def load(self, path: Path | str) -> Tensor:
        """``render`` of an image file, which must be the very file that the teacher saw: [3, H, W] uint8.

        Raises StoreError when its bytes are others, MissingPathError or DataError when it is not there or no image.
        """
        pixels, digest = read_image(Path(path), (self.geometry.height, self.geometry.width), self.exif)
        if digest.hex() != self.content_sha256:
            raise StoreError(f"{self.key}: {path} is not the image file that the teacher saw; write the store again")
        return views.render(pixels, self.geometry)

    def boxes(self, boxes: Tensor | ArrayLike) -> tuple[Tensor, Tensor]:
        """Boxes of the image as boxes of the view: ([G, 4] float32 xyxy canvas pixels, clipped; keep [G] bool).

        ``boxes``: [G, 4] xyxy image pixels. What is not kept is background: less than a canvas pixel a side remains, or in
        a crop less than 2 pixels a side or a quarter of the area. Raises DataError for another shape.
        """
        return views.to_canvas(as_boxes(boxes), self.geometry)

    def to_image(self, boxes: Tensor | ArrayLike) -> Tensor:
        """The inverse, for detections: [D, 4] xyxy canvas pixels -> [D, 4] float32 xyxy image pixels, clipped.

        Raises DataError for another shape.
        """
        return views.to_image(as_boxes(boxes), self.geometry)
