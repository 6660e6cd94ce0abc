"""EXIF orientations: what a file says, what the sizes of a data set prove, and what a user says."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdcli.data.check import CheckReport, check_dataset
from kdcli.data.coco import open_split
from kdcli.data.exif import INVERSE, TRANSPOSE, orientation_of, stored_size
from kdcli.data.images import ImageSizeError, decode_image, probe_image
from kdcli.data.reading import Reading
from kdcli.options import Exif
from tests.support.coco_records import box

UPRIGHT = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)
FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("a.png", {}), ("a.webp", {"lossless": True}), ("a.tif", {}), ("a.tif", {"compression": "tiff_lzw"})
]  # fmt: skip


def _saved(path: Path, pixels: np.ndarray, tag: Any, **options: Any) -> Path:
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize(("name", "options"), FORMATS, ids=lambda value: str(value))
@pytest.mark.parametrize("tag", sorted(TRANSPOSE))
def test_turned_or_not_in_every_format(tmp_path: Path, name: str, options: dict[str, Any], tag: int) -> None:
    stored = np.asarray(Image.fromarray(UPRIGHT).transpose(INVERSE[tag]))
    path = _saved(tmp_path / name, stored, tag, **options)
    assert np.array_equal(decode_image(path, (6, 9))[0], UPRIGHT)
    assert probe_image(path, (6, 9)) == (tag, stored.shape[:2])
    as_stored = stored.shape[:2]
    assert np.array_equal(decode_image(path, as_stored, exif=False)[0], stored)
    if tag >= 5:
        assert np.array_equal(decode_image(path, as_stored)[0], stored)  # the size says so
        with pytest.raises(ImageSizeError, match="leave out --exif ignore"):
            decode_image(path, (6, 9), exif=False)


@pytest.mark.parametrize("tag", ["6", (6, 6), 0, 9, 6.0, b"\x06"])
def test_what_is_no_orientation_says_nothing(tag: Any) -> None:
    image = Image.new("RGB", (9, 6))
    image.getexif()[0x0112] = tag
    assert orientation_of(image) == 1


def _late(kind: bytes, text: bytes) -> Image.Image:
    """A PNG whose chunk of ``kind`` comes after the pixels."""
    data = io.BytesIO()
    Image.fromarray(UPRIGHT).save(data, "PNG")
    chunk = struct.pack(">I", len(text)) + kind + text + struct.pack(">I", zlib.crc32(kind + text))
    whole = data.getvalue()
    return Image.open(io.BytesIO(whole[:-12] + chunk + whole[-12:]))


def test_a_png_that_speaks_after_its_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    image = _late(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    assert orientation_of(image) == 3
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='6' tiff:Orientation=\"8\"/>"
    assert orientation_of(_late(b"iTXt", xmp)) == 8
    comment = _late(b"tEXt", b"date:create\0today")
    assert orientation_of(comment) == 1
    assert "date:create" not in comment.info  # not decoded for it
    assert stored_size(comment) == (6, 9)
    assert np.array_equal(np.asarray(comment), UPRIGHT)  # still readable


def _make(root: Path, split: str, tags: list[int], turned: bool) -> None:
    """Images of 40x60 (and a square) with orientation ``tags``, annotated as turned by them or as stored."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir()
    images = []
    for k, tag in enumerate(tags, 1):
        pixels = np.random.default_rng(k).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        _saved(root / split / f"{k}.png", pixels, tag)
        height, width = (60, 40) if turned and tag >= 5 else (40, 60)
        images.append({"id": k, "file_name": f"{k}.png", "height": height, "width": width})
    annotations = [box(k, k, 1, [2, 3, 10, 20]) for k in range(1, len(tags) + 1)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content))


def _checked(root: Path, split: str, exif: Exif = "auto", **how: Any) -> CheckReport:
    return check_dataset(open_split(root, split), reading=Reading(exif, **how))


def _applied(report: CheckReport) -> bool:
    assert report.dataset is not None
    assert report.dataset.fingerprint().get("exif") == (None if report.dataset.exif else "ignored")
    return report.dataset.exif


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(
    ("tags", "turned", "applied"),
    [
        ([1, 6, 3, 2], True, True),  # sizes prove turned pictures
        ([1, 6, 3, 2], False, False),  # sizes prove stored ones
        ([1, 8, 6], False, True),  # nothing is left to decide: read as ever
        ([1, 3, 4], False, True),  # nothing is proven: read as ever, and said
        ([1, 1], False, True),
    ],
)
def test_what_sizes_prove(tmp_path: Path, tags: list[int], turned: bool, applied: bool, decode: bool) -> None:
    _make(tmp_path, "train", tags, turned)
    report = check_dataset(open_split(tmp_path, "train"), decode=decode)
    assert report.faults == ()
    assert _applied(report) is applied
    open_ones = sum(tag in (2, 3, 4) for tag in tags)
    said = [w for w in report.warnings if "half turn" in w.kind]
    assert [(w.count, w.loud) for w in said] == ([(open_ones, True)] if open_ones else [])
    unproven = bool(open_ones) and not any(tag >= 5 for tag in tags)
    assert any("no size in the data set shows" in w.kind for w in report.warnings) is unproven


def test_pixels_follow_the_rule(tmp_path: Path) -> None:
    _make(tmp_path, "train", [6, 3], turned=False)
    report = _checked(tmp_path, "train")
    assert report.dataset is not None
    path = report.dataset.image_path(1)
    with Image.open(path) as image:
        stored = np.asarray(image)
    assert np.array_equal(decode_image(path, (40, 60), report.dataset.exif)[0], stored)


@pytest.mark.parametrize("turned", [True, False])
def test_a_split_without_proof_goes_by_the_other(tmp_path: Path, turned: bool) -> None:
    _make(tmp_path, "train", [1, 3], turned)
    _make(tmp_path, "val", [1, 6], turned)
    assert _applied(_checked(tmp_path, "train")) is turned
    assert _applied(_checked(tmp_path, "val")) is True  # nothing to decide
    assert _applied(_checked(tmp_path, "train", like_ignored=True)) is False


def test_sizes_that_contradict_each_other_go_by_most_and_are_said(tmp_path: Path) -> None:
    _make(tmp_path, "train", [6, 8, 3, 6], turned=False)
    file = tmp_path / "annotations" / "train.json"
    content = json.loads(file.read_text())
    content["images"][0] |= {"height": 60, "width": 40}
    file.write_text(json.dumps(content))
    report = _checked(tmp_path, "train")
    assert _applied(report) is False
    assert [(w.count, w.loud) for w in report.warnings] == [(1, True), (2, True), (1, True)]


def test_the_user_says(tmp_path: Path) -> None:
    _make(tmp_path, "train", [1, 3, 2], turned=False)
    for exif, applied in (("apply", True), ("ignore", False)):
        report = _checked(tmp_path, "train", exif)  # type: ignore[arg-type]
        assert _applied(report) is applied
        assert [(w.count, w.loud) for w in report.warnings] == [(2, False)]
        assert f"as --exif {exif} says" in report.warnings[0].kind


def test_ignoring_what_is_not_there_changes_nothing(tmp_path: Path) -> None:
    _make(tmp_path, "train", [1, 1], turned=False)
    assert _applied(_checked(tmp_path, "train", "ignore")) is True


def test_against_the_sizes(tmp_path: Path) -> None:
    _make(tmp_path / "stored", "train", [6, 3], turned=False)
    report = _checked(tmp_path / "stored", "train", "apply")
    assert _applied(report) is True
    assert [w.loud for w in report.warnings if "against" in w.kind] == [True]
    _make(tmp_path / "turned", "train", [6, 3], turned=True)
    assert [f.kind for f in _checked(tmp_path / "turned", "train", "ignore").faults] == ["wrong image size"]
