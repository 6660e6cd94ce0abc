"""The crc32c that chunks and shard indices end in, four bytes little-endian, and that the journal has of whole files."""

from __future__ import annotations

import google_crc32c

_WITH_ITSELF = 0x48674BC7  # the crc32c of any bytes that end in their own crc32c, little-endian


def crc_hex(data: bytes) -> str:
    """The crc32c of ``data`` as the journal writes it: eight hexadecimal digits."""
    return f"{google_crc32c.value(data):08x}"


def crc_is_right(data: bytes) -> bool:
    """Whether bytes end in their own crc32c, as chunks and indices do."""
    # of all bytes at once, as cutting four off would copy the others, 2.6 MB of dense features
    return len(data) >= 4 and google_crc32c.value(data) == _WITH_ITSELF


def crc_bytes(data: bytes) -> bytes:
    """The crc32c of ``data``, as it is appended to it."""
    value: int = google_crc32c.value(data)
    return value.to_bytes(4, "little")
