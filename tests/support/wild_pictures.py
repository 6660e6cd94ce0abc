"""Picture files as people have them: bombs, texts, odd EXIF data, other formats under an image's name."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

SIZE = (60, 90)  # height, width, where there is none in the name


def png(width: int, height: int, *chunks: tuple[bytes, bytes], pixels: bytes | None = None) -> bytes:
    """A black PNG made by hand, with more ``chunks`` before its pixels; ``pixels`` are packed."""
    data = zlib.compress(bytes((width * 3 + 1) * height)) if pixels is None else pixels
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    listed = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in listed
    )


def noise(mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or noise()).save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(kind: int, value: bytes) -> bytes:
    """A JPEG whose EXIF orientation is of any TIFF type: 2 text, 3 short, 4 long, 5 fraction, 7 bytes, 11 float."""
    count = len(value) if kind in (2, 7) else 1
    place = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", 26)
    body = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI", 0x112, kind, count) + place + b"\0\0\0\0"
    return encoded("JPEG", exif=b"Exif\0\0" + body + (value if len(value) > 4 else b""))


def readable_pictures() -> dict[str, bytes]:
    """All of SIZE."""
    turned = {
        "zero": (3, b"\0\0"), "nine": (3, b"\x09\0"), "most": (3, b"\xff\xff"), "long": (4, b"\0\0\0\x80"),
        "text": (2, b"left\0"), "number as text": (2, b"6\0"), "long text": (2, b"top-left corner\0"),
        "bytes": (7, b"\xff\xfe\x00\x01"), "fraction": (5, struct.pack("<II", 6, 0)), "nan": (11, struct.pack("<f", np.nan)),
    }  # fmt: skip
    icc = zlib.compress(b"x" * 100)
    height, width = SIZE
    return {
        **{f"exif {name}.jpg": with_orientation(*tag) for name, tag in turned.items()},
        "cut exif.jpg": encoded("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        "long exif.jpg": encoded("JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 60_000),
        "long text.png": png(width, height, (b"tEXt", b"k\0" + b"x" * 3_000_000)),
        "profile.png": png(width, height, (b"iCCP", b"k\0\0" + icc)),
        "more pixels.png": png(width, height, pixels=zlib.compress(bytes(5_000_000))),
        "jpeg.png": encoded("JPEG"),
        "png.jpg": encoded("PNG"),
        "webp.jpg": encoded("WEBP"),
        "animated.gif": encoded("GIF", save_all=True, append_images=[Image.new("RGB", (90, 60))]),
        "animated.webp": encoded("WEBP", save_all=True, append_images=[Image.new("RGB", (90, 60))]),
        "animated.png": encoded("PNG", save_all=True, append_images=[Image.new("RGB", (90, 60))]),
        "pages.tif": encoded("TIFF", save_all=True, append_images=[Image.new("RGB", (90, 60))]),
        "phone.jpg": encoded("MPO", save_all=True, append_images=[Image.new("RGB", (9, 6))]),
        **{f"{mode}.png": encoded("PNG", noise(mode)) for mode in ("1", "L", "LA", "P", "RGBA")},
        **{f"{mode}.tif": encoded("TIFF", noise(mode)) for mode in ("CMYK", "YCbCr", "LAB", "I", "1")},
        **{f"{mode}.jpg": encoded("JPEG", noise(mode)) for mode in ("CMYK", "L")},
    }


def unreadable_pictures() -> dict[str, tuple[bytes, str]]:
    """name -> (bytes, what the message says)."""
    packed = zlib.compress(b"x" * 2_000_000)
    text = "it holds over 1 MB of text beside its pixels); save it again without its metadata"
    none = zlib.compress(b"")
    return {
        "large.png": (
            png(10_000, 10_000, pixels=none),
            "has 100000000 pixels, over the limit of 89478485; scale it down",
        ),
        "bomb.png": (
            png(60_000, 60_000, pixels=none),
            "has 3600000000 pixels, over the limit of 89478485; scale it down",
        ),
        "most.png": (png(2**31 - 1, 2**31 - 1, pixels=none), "has 4611686014132420609 pixels, over the limit"),
        "flat.png": (png(0, 5), "it is a PNG picture, with a damaged header"),
        "ztxt.png": (png(9, 9, (b"zTXt", b"k\0\0" + packed)), text),
        "itxt.png": (png(9, 9, (b"iTXt", b"k\0\1\0\0\0" + packed)), text),
        "texts.png": (png(9, 9, *[(b"tEXt", b"k%d\0" % k + b"x" * 900_000) for k in range(80)]), text),
        "iccp.png": (png(9, 9, (b"iCCP", b"k\0\0" + packed)), text),
        "heic.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(90), "it is a picture in HEIC); save it as JPEG"),
        "svg.png": (b"<?xml version='1.0'?><svg xmlns='x'/>", "it is an SVG drawing); save it as PNG"),
        "page.jpg": (b"<!DOCTYPE html><html>", "it is an HTML page); a download gave a page"),
        "lfs.jpg": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n",
            "a Git-LFS pointer); fetch",
        ),
        "empty.jpg": (b"", "it is an empty file); copy it again"),
        "zeros.jpg": (bytes(999), "it is nothing but zeros"),
        "pdf.jpg": (b"%PDF-1.4\n", "it is a PDF document"),
        "drawing.jpg": (encoded("EPS"), "is a drawing or recording (EPS), not pixels; save it as PNG"),
        "notes.jpg": (b"\x00\x05\x16\x07" + bytes(90), "it is macOS's notes on another file"),
        "cut.jpg": (encoded("JPEG")[:-200], "image file is truncated"),
        "cut.png": (encoded("PNG")[:-200], "image file is truncated"),
        "cut.gif": (encoded("GIF")[:-200], "image file is truncated"),
        "cut early.jpg": (encoded("JPEG")[:30], "Truncated File Read"),
        "float.tif": (encoded("TIFF", noise("F")), "floating-point pixels of no known range"),
    }
