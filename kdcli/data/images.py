"""Read one image file as 8-bit RGB at the size its annotations speak of: every Pillow mode, EXIF orientation, 16 bit.

Alpha is dropped, not composited, as OpenCV and torchvision do. The bytes are hashed on the way, since the worker that
decodes them has them in hand (0.015 ms for 21 kB).
"""

from __future__ import annotations

import hashlib
import io
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from kdcli.data.exif import is_turned, orientation_of, placed, stored_size
from kdcli.errors import DataError, MissingPathError
from kdcli.files import read_regular

if TYPE_CHECKING:
    from torch import Tensor

# what Pillow raises on bytes that are not the picture they claim to be; the bomb warning is refused like the error
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    NotImplementedError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class ImageSizeError(DataError):
    """An image does not have the size that its annotation record gives."""


def read_image(path: Path, expected_size: tuple[int, int], exif: bool = True) -> tuple[Tensor, bytes]:
    """Decode ``path``: (uint8 RGB [3, h, w], contiguous; sha256 of the file, 32 bytes).

    ``expected_size``: (height, width) of the annotation record, pixels. The EXIF orientation is applied if the image
    turned by it has this size; with ``exif`` False never. Raises MissingPathError, DataError for a file that cannot be
    decoded whole, and ImageSizeError for another size.
    """
    import torch  # here, so that kdcli data check starts without it

    pixels, digest = decode_image(path, expected_size, exif)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), digest


def decode_image(
    path: Path, expected_size: tuple[int, int], exif: bool = True
) -> tuple[NDArray[np.uint8], bytes]:  # fmt: skip
    """`read_image` without torch: (uint8 RGB [h, w, 3], sha256 of the file). Raises the same errors."""
    data = _read_bytes(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = to_rgb(image, expected_size, path, exif)
    except DataError:
        raise
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    return pixels, hashlib.sha256(data).digest()


def to_rgb(
    image: Image.Image, expected_size: tuple[int, int], name: Path | str, exif: bool = True
) -> NDArray[np.uint8]:  # fmt: skip
    """The pixels of an opened ``image`` as `read_image` gives them: uint8 RGB [h, w, 3], turned by its EXIF orientation.

    ``name``: what messages call it. Raises DataError for pixels of no known range and ImageSizeError for another size.
    """
    tag, turn = _orientation(image, expected_size, name, exif)
    return _rgb(placed(image, tag, turn), name)


def probe_image(path: Path, expected_size: tuple[int, int], exif: bool = True) -> tuple[int, tuple[int, int]]:
    """The orientation tag of ``path`` (1: upright) and the (height, width) in the file; looks at its header alone.

    Raises as `read_image` does for a missing file, no image, another size.
    """
    try:
        with Image.open(path) as image:
            tag, _ = _orientation(image, expected_size, path, exif)
            return tag, stored_size(image)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise _missing(path) from error
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def _read_bytes(path: Path) -> bytes:
    try:
        return read_regular(path)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _missing(path: Path) -> MissingPathError:
    return MissingPathError(f"image {path} does not exist; restore it or remove it from the annotations")


def _unreadable(path: Path, error: BaseException) -> DataError:
    if isinstance(error, UnidentifiedImageError):  # its own text names a BytesIO object by its address
        reason = "of no known image format"
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"image {path} cannot be decoded ({reason}); replace the file")


def _orientation(
    image: Image.Image, expected: tuple[int, int], path: Path | str, exif: bool
) -> tuple[int, bool]:  # fmt: skip
    """The orientation tag of the image, and whether the image is turned by it to have the ``expected`` (height, width)."""
    height, width = stored_size(image)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:  # Pillow itself only warns up to twice the limit
        raise DataError(f"image {path} has {width * height} pixels, over the limit of {limit}; scale it down")
    tag = orientation_of(image)
    turn = is_turned(tag, (height, width), expected, exif)
    if not turn and expected != (height, width):
        fix = "correct the record or the file"
        if is_turned(tag, (height, width), expected, True):
            fix = "its EXIF orientation turns it to that size: leave out --exif ignore"
        raise ImageSizeError(
            f"image {path} is {height}x{width} (height x width) but its annotation record says "
            f"{expected[0]}x{expected[1]}; {fix}"
        )
    return tag, turn


def _rgb(image: Image.Image, path: Path | str) -> NDArray[np.uint8]:
    """Any Pillow mode as a writable uint8 array [h, w, 3]."""
    if image.mode == "F":
        raise DataError(f"image {path} holds floating-point pixels of no known range; save it with 8 or 16 bit")
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.int64)
        if wide.size and (wide.min() < 0 or wide.max() > 0xFFFF):
            raise DataError(f"image {path} holds values outside 0..65535; save it with 8 or 16 bit")
        grey = (wide >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns that the transparency is lost
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
