"""The EXIF orientation of one picture: what its file says, and whether annotations of a given size mean it turned.

Tags 2 to 4 mirror a picture or turn it by half; 5 to 8 turn it by a quarter, which swaps its sides. Only the latter can
be told by the size that an annotation file gives.
"""

from __future__ import annotations

import struct
from typing import IO, Any

from PIL import Image

EXIF_ORIENTATION = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
INVERSE = {**TRANSPOSE, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # the others undo themselves
SWAPS_SIDES = (5, 6, 7, 8)
TIFF_WIDTH, TIFF_LENGTH = 256, 257
# PNG chunks that may hold an orientation, and how their contents begin
PNG_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")


def orientation_of(image: Image.Image) -> int:
    """The orientation tag of an opened picture, 1 (upright) to 8; a value that is no such number says nothing: 1.

    Does not decode a PNG, unless what says it comes after the pixels.
    """
    if image.format == "PNG" and "exif" not in image.info and not _png_speaks_late(image):
        exif = Image.Image.getexif(image)  # a PNG's own getexif would decode it, in search of chunks behind the pixels
    else:
        exif = image.getexif()
    tag: Any = exif.get(EXIF_ORIENTATION, 1)
    return tag if type(tag) is int and tag in TRANSPOSE else 1


def stored_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of the pixels in the file, not yet loaded: Pillow gives the size of a TIFF as turned."""
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]  # of TiffImageFile
        return int(tags[TIFF_LENGTH]), int(tags[TIFF_WIDTH])
    return image.height, image.width


def turned_size(tag: int, stored: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a picture of ``stored`` (height, width) once it is turned by its tag."""
    return stored[::-1] if tag in SWAPS_SIDES else stored


def is_turned(tag: int, stored: tuple[int, int], expected: tuple[int, int], apply: bool) -> bool:
    """Whether a picture is turned by its ``tag``: where tags count (``apply``) and the turned size is the ``expected`` one."""
    return apply and tag in TRANSPOSE and turned_size(tag, stored) == expected


def placed(image: Image.Image, tag: int, turn: bool) -> Image.Image:
    """The picture, turned by its ``tag`` or as it is stored."""
    if tag not in TRANSPOSE:
        return image
    if image.format == "TIFF":  # the only format that Pillow turns by itself, as it loads
        image.load()
        return image if turn else image.transpose(INVERSE[tag])
    return image.transpose(TRANSPOSE[tag]) if turn else image


def _png_speaks_late(image: Image.Image) -> bool:
    """Whether an orientation may stand behind the pixels of a PNG, where ExifTool writes it; reads chunk headers alone."""
    file: IO[bytes] | None = image.fp  # type: ignore[attr-defined]  # of ImageFile
    if file is None:
        return False
    place = file.tell()
    try:
        return _late_chunk(file)
    finally:
        file.seek(place)


def _late_chunk(file: IO[bytes]) -> bool:
    file.seek(8)
    behind = False
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind == b"IEND":
            return False
        behind = behind or kind == b"IDAT"
        start = file.tell()
        text = file.read(24) if behind and kind in (b"iTXt", b"zTXt", b"tEXt") else b""
        if text.startswith(PNG_TEXTS) or (behind and kind == b"eXIf"):
            return True
        file.seek(start + length + 4)
    return False
