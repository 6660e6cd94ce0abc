"""What ties a stored row to its image: one record of bytes a row, the array ``row/identity``.

| bytes | content |
| --- | --- |
| 0 to 31 | sha256 of the image file |
| 32 to 47 | the guard: a digest of boxes, labels and region definition |
| 48 to 55 | image id, int64; since format version 2 |
| 56 to 63 | blake2b of the view's name; since format version 2 |
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray

from kdcli.structures import RowKey

CONTENT, GUARD = slice(0, 32), slice(32, 48)
_PLACE = slice(48, 64)
FORMAT_VERSION = 2  # of the stores that are written
LENGTH = {1: 48, 2: 64}  # by format version: those that are read


def pack_identity(content: bytes, guard: bytes, key: RowKey, version: int) -> NDArray[np.uint8]:
    """The record of the row of ``key`` in a store of format ``version``: uint8 [48] or [64]."""
    return np.frombuffer((content + guard + _place_of(key))[: LENGTH[version]], np.uint8).copy()


def is_of(record: bytes, key: RowKey) -> bool:
    """Whether ``record`` is of the row of ``key``; one of format version 1 does not say."""
    return record[_PLACE] in (b"", _place_of(key))


def _place_of(key: RowKey) -> bytes:
    # by its name and not its number, so that a row can be copied into a store of other views
    return struct.pack("<q", key.image_id) + hashlib.blake2b(key.view.encode(), digest_size=8).digest()
