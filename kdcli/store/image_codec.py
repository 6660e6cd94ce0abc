"""How a store holds the images of ``--cache-images``: exactly, at about the size of a PNG, undone in two numpy calls.

Red and blue are stored as what they have over green, and each row of pixels as what it has over the row above, all modulo
256. zstd then finds small numbers. The padding of a canvas is constant, so it becomes zeros.
docs/decisions/0015-cached-images.md has the sizes of this and of other ways.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PIXELS = "row/image"  # the array: [3, H * W] uint8, row by row in the orientation of the row of the store
PIXEL_ENCODING = "row_differences"  # its name in the schema


def encode_pixels(canvas: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes [3, H * W] of a canvas [3, H, W] uint8, RGB."""
    coloured = canvas.copy()
    coloured[0] -= canvas[1]
    coloured[2] -= canvas[1]
    codes = coloured.copy()
    codes[:, 1:] -= coloured[:, :-1]
    return codes.reshape(len(canvas), -1)


def decode_pixels(codes: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The canvas [3, H, W] of ``codes`` [3, H * W], in their memory. ``size``: (H, W)."""
    canvas = codes.reshape(len(codes), *size)
    np.add.accumulate(canvas, axis=1, dtype=np.uint8, out=canvas)  # modulo 256, as it was taken apart
    canvas[0] += canvas[1]
    canvas[2] += canvas[1]
    return canvas
