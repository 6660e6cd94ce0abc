"""Runs a detector over image files that belong to no data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from kdcli.classes import ClassList
from kdcli.data.exif import orientation_of, stored_size, turned_size
from kdcli.data.images import decode_image
from kdcli.data.views import render, to_image, view_geometry
from kdcli.detectors.base import Detector
from kdcli.engine.evaluation.coco_metrics import coco_results, write_detections
from kdcli.errors import DataError, MissingPathError
from kdcli.structures import Canvas

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


@dataclass(frozen=True)
class Prediction:
    """Detections on one file, best first."""

    file: Path
    pixels: NDArray[np.uint8]  # [h, w, 3]
    boxes: NDArray[np.float32]  # [D, 4] xyxy image pixels
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]


def image_files(source: Path) -> list[Path]:
    """The image itself, or the images of a folder by name. Raises MissingPathError or DataError."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise MissingPathError(f"'{source}' does not exist; name an image or a folder of images")
    files = sorted(f for f in source.iterdir() if f.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"'{source}' holds no images ({', '.join(SUFFIXES)})")
    return files


def require_images(files: Sequence[Path], exif: bool = True) -> None:
    """Decode every file once, so that a bad one is named before anything is written. Raises DataError.

    Decoding is a small part of detecting and drawing; a header alone would not show that the rest is cut off.
    """
    for file in files:
        decode_image(file, _size(file, exif), exif)


def predict_files(
    detector: Detector, files: Sequence[Path], canvas: Canvas, device: torch.device,
    classes: ClassList, detections: Path, exif: bool = True,
) -> Iterator[Prediction]:  # fmt: skip
    """Detect on each file in turn; when all are done, write COCO results to ``detections`` (image_id = file name).

    ``exif``: turn images by their EXIF orientation.
    """
    detector.to(device).eval()
    category_ids = np.array(classes.ids)
    results: list[dict[str, Any]] = []
    for file in files:
        pixels, _ = decode_image(file, _size(file, exif), exif)
        geometry = view_geometry(canvas, pixels.shape[0], pixels.shape[1], "identity", 0, 0)
        image = render(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), geometry)
        with torch.no_grad():
            outputs = detector(image[None].to(device).float() / 255)
            found = detector.decode(outputs, torch.tensor([geometry.content], device=device), geometry.canvas)[0]
        boxes = to_image(found.boxes.cpu(), geometry).numpy()
        scores, labels = found.scores.cpu().numpy(), found.labels.cpu().numpy()
        for result in coco_results(0, boxes, scores, category_ids[labels]):
            results.append({**result, "image_id": file.name})
        yield Prediction(file, pixels, boxes, scores, labels)
    write_detections(detections, results)


def _size(file: Path, exif: bool) -> tuple[int, int]:
    """(height, width), with ``exif`` after the EXIF orientation: no annotation says how the image should lie."""
    try:
        with Image.open(file) as image:
            stored = stored_size(image)
            return turned_size(orientation_of(image), stored) if exif else stored
    except (UnidentifiedImageError, OSError) as error:
        reason = "of no known image format" if isinstance(error, UnidentifiedImageError) else error.strerror or error
        raise DataError(f"image '{file}' cannot be opened ({reason}); replace or remove the file") from error
