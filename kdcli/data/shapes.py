"""Draw the demo set: eight kinds of shapes on textured backgrounds, in COCO layout, the same bytes for the same seed.

Shapes are rotated, squashed, shaded and 8 pixels to 60 % of the side across; they cover each other and hang over the
border. The box is the tight box of the pixels that can be seen, and a place is taken only if every shape stays at least
half visible, so that whatever is drawn is also annotated. Soft blobs and strokes distract, and some images are empty.
"""

from __future__ import annotations

import colorsys
import io
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from kdcli.errors import DataError, NoSpaceError, OptionError
from kdcli.files import atomic_write_bytes, atomic_write_text

CLASSES = ("circle", "square", "triangle", "star", "cross", "ring", "hexagon", "arrow")
MARKER = "shapes.json"  # written first: tells a set that lacks files from somebody else's folder
FORMAT = 2
SUPERSAMPLE = 4
MIN_SIZE = 8.0  # pixels across
MAX_SIZE = 0.6  # of the shorter side
MAX_SHAPES = 9
SIZE_SKEW = 0.75  # < 1: more large shapes than a log-uniform draw gives
MIN_VISIBLE = 0.5  # of a shape's own pixels
MIN_CONTRAST = 70.0  # distance in RGB between a shape and what lies under it
EMPTY_SHARE = 0.03
PLACE_TRIES = 20
JPEG_QUALITY = 90

Pixels = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass
class _Shape:
    label: int
    visible: Mask  # [h, w]
    own_pixels: int  # with what hangs over the border


def make_shapes(
    out: Path, *, num_train: int = 300, num_val: int = 100, seed: int = 0, size: tuple[int, int] = (192, 256)
) -> None:
    """Write ``out/annotations/{train,val}.json`` and ``out/{train,val}/*.jpg``. ``size``: smallest, largest side.

    A complete set of the same arguments is left as it is, and one that lacks files gets them. A new set is drawn in a
    hidden folder first and appears whole. Raises OptionError for impossible numbers, DataError when ``out`` holds
    anything else, and NoSpaceError when the disk is full.
    """
    if num_train < 1 or num_val < 1 or seed < 0 or not 64 <= size[0] <= size[1] <= 4096:
        raise OptionError(
            f"shapes: {num_train} and {num_val} images, seed {seed}, sides {size[0]}..{size[1]}: need one image "
            "or more of each split, a seed from 0 and sides in 64..4096"
        )
    counts = {"train": num_train, "val": num_val}
    marker = json.dumps({"kdcli_shapes": FORMAT, "images": counts, "seed": seed, "sides": list(size)}, sort_keys=True)
    out = Path(out)
    staging = out / f".{MARKER}.making" if out.exists() else out.with_name(f".{out.name}.making")
    if out.exists() and (not out.is_dir() or any(p != staging for p in out.iterdir())):
        if not (out / MARKER).is_file() or (out / MARKER).read_text("utf-8") != marker:
            raise DataError(f"{out} is not empty and not this demo set; choose an empty folder")
        if _complete(out, counts):
            return
        shutil.rmtree(staging, ignore_errors=True)
        _write(out, counts, marker, seed, size)
        return
    shutil.rmtree(staging, ignore_errors=True)  # of a killed run
    try:
        _write(staging, counts, marker, seed, size)
        if out.exists():  # an empty folder is filled and not replaced: it may be the one the user is in
            for part in sorted(staging.iterdir(), key=lambda p: p.name != MARKER):  # so that a kill here is known
                part.rename(out / part.name)
        else:
            staging.rename(out)
    except NoSpaceError as error:
        raise NoSpaceError(f"{out}: the disk is full; free some space or choose another place") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def draw_image(rng: np.random.Generator, size: tuple[int, int]) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """One image [h, w, 3] and its annotations (``category_id`` 1.., ``bbox`` xywh pixels, ``area`` square pixels)."""
    height, width = (int(v) for v in rng.integers(size[0], size[1] + 1, size=2))
    canvas = _background(rng, height, width)
    count = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(1, MAX_SHAPES + 1))
    largest = MAX_SIZE * min(height, width)
    sizes = MIN_SIZE * (largest / MIN_SIZE) ** (rng.uniform(size=count) ** SIZE_SKEW)
    shapes: list[_Shape] = []
    for across in sorted(sizes.tolist(), reverse=True):  # large ones first, so that none disappears under another
        _place(rng, canvas, shapes, across)
    canvas += _grain(rng, canvas.shape)
    annotations = []
    for shape in shapes:
        ys, xs = np.flatnonzero(shape.visible.any(axis=1)), np.flatnonzero(shape.visible.any(axis=0))
        box = [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)]
        annotations.append({"category_id": shape.label + 1, "bbox": box, "area": int(shape.visible.sum())})
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), annotations


def _names(count: int) -> list[str]:
    return [f"{i:05d}.jpg" for i in range(count)]


def _complete(out: Path, counts: dict[str, int]) -> bool:
    """True when every file is there; the annotations of a split are written after its images."""
    return all(
        (out / "annotations" / f"{split}.json").is_file() and all((out / split / n).is_file() for n in _names(count))
        for split, count in counts.items()
    )


def _write(out: Path, counts: dict[str, int], marker: str, seed: int, size: tuple[int, int]) -> None:
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / MARKER, marker)
    for number, (split, count) in enumerate(counts.items()):
        (out / split).mkdir(exist_ok=True)
        _write_split(out, split, count, np.random.SeedSequence([seed, number]), size)


def _write_split(out: Path, split: str, count: int, seeds: np.random.SeedSequence, size: tuple[int, int]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, (name, child) in enumerate(zip(_names(count), seeds.spawn(count), strict=True)):
        pixels, boxes = draw_image(np.random.Generator(np.random.PCG64(child)), size)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "JPEG", quality=JPEG_QUALITY)
        atomic_write_bytes(out / split / name, data.getvalue())
        images.append({"id": i + 1, "file_name": name, "height": pixels.shape[0], "width": pixels.shape[1]})
        for box in boxes:
            annotations.append({"id": len(annotations) + 1, "image_id": i + 1, "iscrowd": 0, "segmentation": [], **box})
    content = {
        "info": {"description": "shapes drawn by kdcli data make-shapes"},
        "licenses": [],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
        "images": images,
        "annotations": annotations,
    }
    atomic_write_text(out / "annotations" / f"{split}.json", json.dumps(content))


def _background(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """A gradient with stripes, checks or noise on it, and soft blobs and strokes that are no shapes."""
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    along = (math.cos(angle) * xs + math.sin(angle) * ys) / max(height, width)
    canvas = rng.uniform(60, 190, size=3) + along[:, :, None] * rng.uniform(-60, 60, size=3)
    kind, period = int(rng.integers(3)), rng.uniform(6, 40)
    if kind == 0:
        wave = np.sin(2 * math.pi / period * (math.cos(angle) * ys - math.sin(angle) * xs))
    elif kind == 1:
        wave = np.where((xs // period + ys // period) % 2 == 0, 1.0, -1.0)
    else:
        coarse = rng.uniform(-1, 1, size=(int(height / period) + 2, int(width / period) + 2)).astype(np.float32)
        wave = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    canvas = canvas + wave[:, :, None] * rng.uniform(-25, 25, size=3)
    for _ in range(int(rng.integers(2, 7))):
        radius = rng.uniform(5, 30)
        distance = (xs - rng.uniform(0, width)) ** 2 + (ys - rng.uniform(0, height)) ** 2
        canvas = canvas + np.exp(-distance / radius**2)[:, :, None] * rng.uniform(-70, 70, size=3)
    strokes = Image.new("L", (width, height))
    pen = ImageDraw.Draw(strokes)
    for _ in range(int(rng.integers(0, 5))):
        x0, y0, x1, y1 = (int(v) for v in rng.uniform(0, 1, size=4) * [width, height, width, height])
        pen.line((x0, y0, x1, y1), fill=255, width=int(rng.integers(1, 4)))
    alpha = np.asarray(strokes)[:, :, None] / 255 * rng.uniform(0.3, 0.8)
    blended: Pixels = (canvas * (1 - alpha) + rng.uniform(0, 255, size=3) * alpha).astype(np.float32)
    return blended


def _grain(rng: np.random.Generator, shape: tuple[int, ...]) -> Pixels:
    """The noise of a camera, in grey levels."""
    return rng.normal(0, rng.uniform(2, 7), size=shape).astype(np.float32)


def _place(rng: np.random.Generator, canvas: Pixels, shapes: list[_Shape], across: float) -> None:
    """Draw one shape where it leaves every shape half visible, itself included; nothing if no such place is found."""
    height, width = canvas.shape[:2]
    label = int(rng.integers(len(CLASSES)))
    stamp = _stamp(rng, label, across)
    side = stamp.shape[0]
    solid = stamp >= 0.5
    for _ in range(PLACE_TRIES):
        x, y = (
            int(rng.integers(-side // 3, width - 2 * side // 3)),
            int(rng.integers(-side // 3, height - 2 * side // 3)),
        )
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + side, width), min(y + side, height)
        part = (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))
        covered = np.zeros((height, width), dtype=bool)
        covered[y0:y1, x0:x1] = solid[part]
        own = int(solid.sum())
        if covered.sum() < MIN_VISIBLE * own:
            continue
        if any((s.visible & ~covered).sum() < MIN_VISIBLE * s.own_pixels for s in shapes):
            continue
        for shape in shapes:
            shape.visible &= ~covered
        shapes.append(_Shape(label, covered, own))
        _paint(rng, canvas[y0:y1, x0:x1], stamp[part][:, :, None], label)
        return


def _paint(rng: np.random.Generator, target: Pixels, alpha: Pixels, label: int) -> None:
    """Blend a shaded colour that stands out into ``target``, in place."""
    under = (target * alpha).sum(axis=(0, 1)) / alpha.sum()
    color = _color(rng, label)
    while np.linalg.norm(color - under) < MIN_CONTRAST:
        color = _color(rng, label)
    shade = np.linspace(-1, 1, target.shape[1], dtype=np.float32)[None, :, None] * rng.uniform(-25, 25)
    target += alpha * (color + shade - target)


def _color(rng: np.random.Generator, label: int) -> Pixels:
    """RGB [3] in 0..255 of a shape: its hue tells the class, so that a first detector learns within minutes.

    With a third of the shapes in any hue, the demo's teacher found the shapes and mixed up their classes: 13 AP, not 38.
    """
    hue = (label + rng.uniform(-0.4, 0.4)) / len(CLASSES)
    return np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.5, 1), rng.uniform(0.4, 1)), dtype=np.float32) * 255


def _stamp(rng: np.random.Generator, label: int, across: float) -> Pixels:
    """The coverage [s, s] in 0..1 of one shape, ``across`` pixels large, squashed and rotated."""
    side = math.ceil(across) + 2
    image = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE))
    pen = ImageDraw.Draw(image)
    angle, squash = float(rng.uniform(0, 2 * math.pi)), float(rng.uniform(0.75, 1.0))
    for points, fill in _outlines(CLASSES[label]):
        xs, ys = points[:, 0], points[:, 1] * squash
        turned = np.stack([xs * math.cos(angle) - ys * math.sin(angle), xs * math.sin(angle) + ys * math.cos(angle)], 1)
        corners = (turned * across / 2 + side / 2) * SUPERSAMPLE
        pen.polygon([(float(x), float(y)) for x, y in corners], fill=fill)
    coverage = np.asarray(image.reduce(SUPERSAMPLE), dtype=np.float32) / np.float32(255)
    return coverage


def _outlines(name: str) -> list[tuple[NDArray[np.float64], int]]:
    """Polygons [n, 2] inside the unit circle with their fill (255 shape, 0 hole), painted in this order."""

    def star(count: int, inner: float = 1.0) -> NDArray[np.float64]:
        turns = 2 * math.pi * np.arange(count) / count
        radius = np.where(np.arange(count) % 2 == 0, 1.0, inner)
        return np.stack([radius * np.sin(turns), -radius * np.cos(turns)], axis=1)

    arm = 0.3
    cross = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
    cross += [(-x, -y) for x, y in cross]
    arrow = [(0, -1), (0.75, -0.1), (0.3, -0.1), (0.3, 0.95), (-0.3, 0.95), (-0.3, -0.1), (-0.75, -0.1)]
    outlines: dict[str, list[tuple[NDArray[np.float64], int]]] = {
        "circle": [(star(48), 255)],
        "square": [(star(4), 255)],
        "triangle": [(star(3), 255)],
        "star": [(star(10, 0.42), 255)],
        "cross": [(np.array(cross) * 0.95, 255)],
        "ring": [(star(48), 255), (star(48) * 0.55, 0)],
        "hexagon": [(star(6), 255)],
        "arrow": [(np.array(arrow), 255)],
    }
    return outlines[name]
