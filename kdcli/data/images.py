"""Read one image file as 8-bit RGB at the size its annotations speak of: every Pillow mode, EXIF orientation, 16 bit.

Alpha is dropped, not composited, as OpenCV and torchvision do. The bytes are hashed on the way, since the worker that
decodes them has them in hand (0.015 ms for 21 kB).
"""

from __future__ import annotations

import errno
import hashlib
import io
import re
import stat
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from kdcli.data.exif import is_turned, orientation_of, placed, stored_size
from kdcli.errors import DataError, MissingPathError
from kdcli.files import NotAFileError, kind_of, read_regular
from kdcli.filetypes import A_TEXT, name_file

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
    RuntimeError,  # of AVIF's decoder
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
# formats that another program would have to draw (Pillow starts Ghostscript) or that Pillow only recognises
DRAWN_ELSEWHERE = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")
MAX_TEXT = "MAX_TEXT_"  # in Pillow's word for a PNG with more compressed text than it takes: 1 MB in a chunk

# Pillow's own remarks on odd files; what is wrong with a picture is said here, in one line that names it
warnings.filterwarnings("ignore", module=r"PIL\.")


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
        raise unreadable(path, error) from error
    return pixels, hashlib.sha256(data).digest()


def file_digest(path: Path) -> bytes:
    """The sha256 of an image file, 32 bytes, as ``read_image`` gives it. Raises its errors for a file that cannot be read."""
    return hashlib.sha256(_read_bytes(path)).digest()


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
        _require_file(path)
        with Image.open(path) as image:
            tag, _ = _orientation(image, expected_size, path, exif)
            return tag, stored_size(image)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise _missing(path) from error
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def _read_bytes(path: Path) -> bytes:
    try:
        return read_regular(path)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _require_file(path: Path) -> None:
    """Raises NotAFileError for what a reader would wait for or read for ever: a pipe, a device. 2 us."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise NotAFileError(errno.EINVAL, f"is {kind_of(mode)}, not a file", str(path))


def _missing(path: Path) -> MissingPathError:
    return MissingPathError(f"image {path} does not exist; restore it or remove it from the annotations")


def unreadable(path: Path, error: BaseException) -> DataError:
    """The error for a picture on which Pillow, or reading it, raised ``error``: one of ``UNREADABLE``."""
    reason, fix = " ".join(str(error).split())[:200] or type(error).__name__, "replace the file"
    if isinstance(error, NotAFileError):
        reason = f"it {error.strerror}"
    elif isinstance(error, UnidentifiedImageError):  # its own text names a BytesIO object by its address
        reason = "of no known image format"
        if path.is_file() and (known := name_file(path)) is not None and known != A_TEXT:
            head = ", with a damaged header" if known[0].endswith("picture") else ""
            reason, fix = f"it is {known[0]}{head}", known[1] or fix
    elif isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        pixels = re.search(r"\((\d+) pixels\)", reason)
        return _too_large(path, pixels[1] if pixels else "too many")
    elif MAX_TEXT in reason:
        reason, fix = "it holds over 1 MB of text beside its pixels", "save it again without its metadata"
    elif isinstance(error, MemoryError):
        reason = "not enough memory for it"
    return DataError(f"image {path} cannot be decoded ({reason}); {fix}")


def require_within_limit(image: Image.Image, path: Path | str) -> None:
    """Raise DataError for more pixels than Pillow's limit, up to twice of which it only warns. Before asking for the EXIF:
    to find that of a PNG Pillow decodes it, 19 s for 100 million pixels that are not there."""
    limit, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if limit is not None and pixels > limit:
        raise _too_large(path, pixels)


def _too_large(path: Path | str, pixels: int | str) -> DataError:
    return DataError(f"image {path} has {pixels} pixels, over the limit of {Image.MAX_IMAGE_PIXELS}; scale it down")


def _orientation(
    image: Image.Image, expected: tuple[int, int], path: Path | str, exif: bool
) -> tuple[int, bool]:  # fmt: skip
    """The orientation tag of the image, and whether the image is turned by it to have the ``expected`` (height, width)."""
    require_within_limit(image, path)
    height, width = stored_size(image)
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
    if image.format in DRAWN_ELSEWHERE:
        raise DataError(f"image {path} is a drawing or recording ({image.format}), not pixels; save it as PNG")
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
