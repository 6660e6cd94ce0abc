"""Every kind of image file becomes 8-bit RGB of the annotated size, or a one-line error."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdcli.data.images import ImageSizeError, probe_image, read_image
from kdcli.errors import DataError, MissingPathError
from tests.support.wild_pictures import SIZE as WILD_SIZE
from tests.support.wild_pictures import encoded, readable_pictures, unreadable_pictures

SIZE = (6, 9)  # height, width


def _save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def _pixel(path: Path, x: int = 0, y: int = 0) -> list[int]:
    image, digest = read_image(path, SIZE)
    assert image.dtype == torch.uint8
    assert image.shape == (3, *SIZE)
    assert image.is_contiguous()
    assert digest == hashlib.sha256(path.read_bytes()).digest()
    probe_image(path, SIZE)
    return [int(v) for v in image[:, y, x]]


def _plain(mode: str, color: object) -> Image.Image:
    return Image.new(mode, (SIZE[1], SIZE[0]), color)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "color", "name", "rgb"),
    [
        ("RGB", (10, 20, 30), "a.png", [10, 20, 30]),
        ("L", 77, "a.png", [77, 77, 77]),
        ("1", 1, "a.png", [255, 255, 255]),
        ("RGBA", (10, 20, 30, 0), "a.png", [10, 20, 30]),
        ("LA", (50, 128), "a.png", [50, 50, 50]),
        ("CMYK", (255, 0, 0, 0), "a.tif", [0, 255, 255]),
        ("I;16", 0x1234, "a.png", [0x12] * 3),
        ("I;16", 0xFFFF, "a.tif", [0xFF] * 3),
        ("I", 0x8000, "a.tif", [0x80] * 3),
    ],
)
def test_modes(tmp_path: Path, mode: str, color: object, name: str, rgb: list[int]) -> None:
    assert _pixel(_save(tmp_path / name, _plain(mode, color))) == rgb


def test_cmyk_jpeg(tmp_path: Path) -> None:
    red, green, blue = _pixel(_save(tmp_path / "a.jpg", _plain("CMYK", (0, 255, 255, 0))))
    assert red > 240
    assert green < 15
    assert blue < 15


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = _plain("RGB", (200, 100, 50)).quantize(4)
    assert _pixel(_save(tmp_path / "a.png", image)) == [200, 100, 50]
    assert _pixel(_save(tmp_path / "b.png", image, transparency=b"\x00\x80\xff\xff")) == [200, 100, 50]
    assert _pixel(_save(tmp_path / "c.gif", image, transparency=0)) == [200, 100, 50]


def test_grey_png_with_a_transparent_value(tmp_path: Path) -> None:
    assert _pixel(_save(tmp_path / "a.png", _plain("L", 60), transparency=60)) == [60, 60, 60]


@pytest.mark.parametrize(("mode", "color"), [("F", 0.5), ("I", 70_000), ("I", -1)])
def test_pixels_of_no_known_range_are_refused(tmp_path: Path, mode: str, color: float) -> None:
    path = _save(tmp_path / "a.tif", _plain(mode, color))
    with pytest.raises(DataError, match="save it with 8 or 16 bit"):
        read_image(path, SIZE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_when_the_turned_size_is_annotated(tmp_path: Path, orientation: int) -> None:
    height, width = SIZE
    upright = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # the others are their own inverses
    own = {2: 0, 3: 3, 4: 1, 5: 5, 7: 6}
    stored = Image.fromarray(upright)
    if orientation != 1:
        stored = stored.transpose(undo.get(orientation, Image.Transpose(own.get(orientation, 0))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _save(tmp_path / "a.png", stored, exif=exif)
    image, _ = read_image(path, SIZE)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), upright)


def test_exif_orientation_is_left_alone_when_the_stored_size_is_annotated(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = _plain("RGB", 0)
    image.putpixel((0, 0), (255, 255, 255))
    path = _save(tmp_path / "a.png", image, exif=exif)
    assert _pixel(path) == [255, 255, 255]
    turned, _ = read_image(path, (SIZE[1], SIZE[0]))
    assert turned[0, 0].tolist() == [0] * 5 + [255]


def test_another_size_is_an_error_of_its_own(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.png", _plain("RGB", 0))
    for look in (read_image, probe_image):
        with pytest.raises(ImageSizeError, match=r"a\.png is 6x9 .* says 7x9"):
            look(path, (7, 9))


def test_missing_truncated_and_foreign_files(tmp_path: Path) -> None:
    for look in (read_image, probe_image):
        with pytest.raises(MissingPathError, match=r"none\.png does not exist"):
            look(tmp_path / "none.png", SIZE)
        (tmp_path / "text.png").write_text("hello")
        with pytest.raises(DataError, match=r"text\.png cannot be decoded"):
            look(tmp_path / "text.png", SIZE)
    noise = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    for name in ("a.png", "a.jpg"):
        path = _save(tmp_path / name, Image.fromarray(noise))
        path.write_bytes(path.read_bytes()[:-40])
        probe_image(path, SIZE)  # the header is whole
        with pytest.raises(DataError, match="cannot be decoded"):
            read_image(path, SIZE)


def test_the_bomb_limit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _save(tmp_path / "a.png", _plain("RGB", 0))
    for limit in (40, 20):  # 54 pixels: Pillow warns, Pillow refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=r"a\.png"):
            read_image(path, SIZE)


READABLE, UNREADABLE = readable_pictures(), unreadable_pictures()


@pytest.mark.filterwarnings("ignore")  # Pillow's, which kdcli.data.images switches off
@pytest.mark.parametrize("name", sorted(READABLE))
def test_odd_pictures_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(READABLE[name])
    image, _ = read_image(tmp_path / name, WILD_SIZE)
    assert image.shape == (3, *WILD_SIZE)
    probe_image(tmp_path / name, WILD_SIZE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(UNREADABLE))
def test_what_is_no_picture_is_named(name: str, tmp_path: Path) -> None:
    data, words = UNREADABLE[name]
    (tmp_path / name).write_bytes(data)
    size = WILD_SIZE if name.startswith(("cut", "float", "drawing")) else (9, 9)
    with pytest.raises(DataError) as caught:
        read_image(tmp_path / name, size)
    said = str(caught.value)
    assert words in said
    assert said.startswith(f"image {tmp_path / name} ")
    assert said.isprintable()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    for look in (read_image, probe_image):
        with pytest.raises(DataError, match=r"a\.jpg cannot be decoded \(it is a named pipe, not a file\)"):
            look(tmp_path / "a.jpg", SIZE)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_damage_of_any_kind_is_one_line(tmp_path: Path) -> None:
    """400 damaged files of every format that Pillow writes here: pixels, or a DataError that names the file."""
    chance, file, said = random.Random(0), tmp_path / "a", list[str]()
    kinds = (
        "JPEG",
        "PNG",
        "GIF",
        "WEBP",
        "BMP",
        "PPM",
        "TGA",
        "JPEG2000",
        "ICO",
        "PCX",
        "SGI",
        "AVIF",
        "DDS",
        "IM",
        "EPS",
    )
    pictures = [encoded(kind) for kind in kinds if kind in Image.SAVE]
    assert len(pictures) > 12
    for k in range(400):
        data = bytearray(pictures[k % len(pictures)])
        place = chance.randrange(min(len(data), chance.choice([60, 300, len(data)])))
        change = chance.choice(["flip", "byte", "cut", "delete", "insert"])
        if change == "flip":
            data[place] ^= 1 << chance.randrange(8)
        elif change == "byte":
            data[place] = chance.choice([0, 255, 127, 128])
        elif change == "cut":
            del data[place:]
        elif change == "delete":
            del data[place : place + chance.randrange(1, 300)]
        else:
            data[place:place] = chance.randbytes(chance.randrange(1, 300))
        file.write_bytes(data)
        for look in (read_image, probe_image):
            try:
                look(file, WILD_SIZE)
            except DataError as error:
                said.append(str(error))
    assert len(said) > 200
    assert [line for line in said if not line.startswith(f"image {file} ") or "\n" in line] == []
