"""What a store's files are asked for, wherever they are. Every file is there whole or not at all.

Keys are paths inside the store with ``/``. Writers and readers go through here, so that what a store is does not depend
on where it is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class OpenFile:
    """A file that is open for random reads."""

    key: str
    size: int
    tail: bytes  # its last bytes, as many as were asked for
    version: str = ""  # in an object store: other contents have another
    descriptor: int = -1  # on a disk

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class Storage(Protocol):
    """The files of one store. ``str()`` names it in messages.

    What is in an object store raises MissingPathError when there is no such bucket, and StoreError when the server refuses
    or cannot be reached.
    """

    def exists(self) -> bool:
        """Whether there is something here."""
        ...

    def has(self, key: str) -> bool:
        """Whether there is such a file."""
        ...

    def open_all(self, keys: Sequence[str], tail: int) -> list[OpenFile | None]:
        """Open files for random reads, reading their last ``tail`` bytes; None for one that is not there."""
        ...

    def read_ranges(self, ranges: Sequence[tuple[OpenFile, int, int]]) -> list[bytes]:
        """For each file, start and length: the bytes, fewer at the end of the file."""
        ...

    def read(self, key: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        ...

    def read_all(self, keys: Sequence[str]) -> list[bytes]:
        """Whole files. Raises FileNotFoundError."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Replace a file: its readers see the old bytes or the new ones, and it survives a power cut."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write a file that is not there yet; False when there is one with other bytes, which stays."""
        ...

    def delete(self, key: str) -> None:
        """Remove a file that may not be there."""
        ...

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files directly in ``folder``, without hidden ones; none when it is not there."""
        ...

    def for_zarr(self) -> Any:
        """What ``zarr.open_group`` takes."""
        ...


Where = str | Path | Storage
