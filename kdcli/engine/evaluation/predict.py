"""Runs a detector over image files that belong to no data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kdcli.classes import ClassList
from kdcli.data.exif import orientation_of, stored_size, turned_size
from kdcli.data.images import UNREADABLE, decode_image, require_within_limit, unreadable
from kdcli.data.views import render, to_image, view_geometry
from kdcli.detectors.base import Detector
from kdcli.engine.evaluation.coco_metrics import coco_results, write_detections
from kdcli.errors import DataError, MissingPathError, pluralize
from kdcli.structures import Canvas

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
FRAMES = ("GIF", "WEBP", "PNG", "TIFF", "AVIF")  # not MPO: a phone's JPEG with a preview behind it


@dataclass(frozen=True)
class Prediction:
    """Detections on one file, best first."""

    file: Path
    pixels: NDArray[np.uint8]  # [h, w, 3]
    boxes: NDArray[np.float32]  # [D, 4] xyxy image pixels
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]


def image_files(source: Path) -> tuple[list[Path], int]:
    """The image itself, or the images of a folder by name; and how many of their names were left out.

    Left out are hidden files, such as macOS's ``._a.jpg``, and what is no file. Raises MissingPathError or DataError.
    """
    if source.is_file():
        return [source], 0
    if not source.is_dir():
        raise MissingPathError(f"'{source}' does not exist; name an image or a folder of images")
    named = sorted(f for f in source.iterdir() if f.suffix.lower() in SUFFIXES)
    files = [f for f in named if not f.name.startswith(".") and f.is_file()]
    if not files:
        raise DataError(f"'{source}' holds no images ({', '.join(SUFFIXES)})")
    return files, len(named) - len(files)


def require_images(files: Sequence[Path], exif: bool = True) -> int:
    """Decode every file once, so that a bad one is named before anything is written. Raises DataError.

    Decoding is a small part of detecting and drawing; a header alone would not show that the rest is cut off.
    Returns how many have several frames or pages, of which the first is taken.
    """
    bad, several = [], 0
    for file in files:
        try:
            size, frames = _look(file, exif)
            decode_image(file, size, exif)
            several += frames > 1
        except DataError as error:
            bad.append(error)
    if len(bad) > 1:
        raise DataError(f"{pluralize(len(bad), 'image')} of {len(files)} cannot be read, the first: {bad[0]}")
    if bad:
        raise bad[0]
    return several


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
        pixels, _ = decode_image(file, _look(file, exif)[0], exif)
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


def _look(file: Path, exif: bool) -> tuple[tuple[int, int], int]:
    """(height, width), with ``exif`` after the EXIF orientation: no annotation says how the image should lie; and frames."""
    try:
        with Image.open(file) as image:
            require_within_limit(image, file)
            stored = stored_size(image)
            size = turned_size(orientation_of(image), stored) if exif else stored
            return size, getattr(image, "n_frames", 1) if image.format in FRAMES else 1
    except DataError:
        raise
    except UNREADABLE as error:
        raise unreadable(file, error) from error
