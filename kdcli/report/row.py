"""Draws one stored row: the view with its boxes, the positives, the VLR, the teacher's boxes and features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from kdcli.engine.caching.show import ShownRow
from kdcli.report.colours import colour_of
from kdcli.report.draw import draw_detections, side_by_side
from kdcli.tensors import Region

POSITIVE, REGION = colour_of(1), colour_of(0)
TEACHER_BOXES = 30  # the best ones: positives repeat each box about nine times


def draw_row(row: ShownRow) -> Image.Image:
    """Panels side by side; those whose tensors are not in the store are left out."""
    pixels: NDArray[np.uint8] = row.image.permute(1, 2, 0).numpy()
    classes = sorted(set(row.labels))
    panels = [(f"{row.key}", draw_detections(pixels, row.boxes.numpy(), row.labels, classes=classes))]
    if row.entries is not None:
        main, vlr = row.entries.select(Region.MAIN).numpy(), row.entries.select(Region.VLR).numpy()
        centers = row.centers.numpy()
        panels.append((f"positives ({int(main.sum())})", _points(pixels, centers[main], POSITIVE)))
        if vlr.any():
            weights = row.entries.weight.numpy()[vlr]
            panels.append((f"VLR ({int(vlr.sum())})", _points(pixels, centers[vlr], REGION, weights)))
    if row.teacher_boxes is not None and row.entries is not None:
        names = [row.labels[g] for g in row.entries.gt[row.entries.select(Region.MAIN)].tolist()]
        scores = row.teacher_scores.numpy() if row.teacher_scores is not None else np.ones(len(names))
        best = np.argsort(-scores, kind="stable")[:TEACHER_BOXES]
        drawn = draw_detections(
            pixels, row.teacher_boxes.numpy()[best], [names[i] for i in best], scores[best], classes=classes
        )
        panels.append(("teacher at positives", drawn))
    if row.heat is not None:
        heat = row.heat.numpy()
        scaled = (255 * (heat - heat.min()) / max(float(np.ptp(heat)), 1e-9)).astype(np.uint8)
        size = (pixels.shape[1], pixels.shape[0])
        panels.append(("teacher features, finest level", Image.fromarray(scaled).resize(size).convert("RGB")))
    return side_by_side(panels)


def _points(
    pixels: NDArray[np.uint8], centers: NDArray[np.float32], colour: tuple[int, int, int] | str,
    weights: NDArray[np.float32] | None = None,
) -> Image.Image:  # fmt: skip
    """Dots on a dimmed view; a larger weight makes a larger dot."""
    scale = max(1, round(640 / max(pixels.shape[:2])))
    picture = Image.fromarray((pixels * 0.55).astype(np.uint8))
    picture = picture.resize((picture.width * scale, picture.height * scale))
    pen = ImageDraw.Draw(picture)
    for k, (x, y) in enumerate(centers.tolist()):
        radius = scale * (2.0 if weights is None else 0.8 + 3.0 * float(weights[k]))
        pen.ellipse((x * scale - radius, y * scale - radius, x * scale + radius, y * scale + radius), fill=colour)
    return picture
