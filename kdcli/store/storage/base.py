"""What the files of a store are asked for, wherever they are. Every file is there whole or not at all.

Keys are paths inside the store with ``/``. Writers and readers go through ``Storage``, so that what a store is does not
depend on where it is, and what a local disk can do (locks, free space, changes in place) is asked for here too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
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
    or cannot be reached. Object stores have no locks: there the ``lock`` methods hold nothing.
    """

    @property
    def folder(self) -> Path | None:
        """The folder that the store is, there or not yet; None in an object store."""
        ...

    @property
    def max_open(self) -> int:
        """How many of its files a reader may keep open."""
        ...

    @property
    def zarr_config(self) -> Mapping[str, str]:
        """Settings of zarr-python for reading through ``for_zarr``."""
        ...

    def local_folder(self, verb: str) -> Path:
        """The folder of a store that is to be changed in place. ``verb``: e.g. ``prune it``.

        Raises OptionError for an object store.
        """
        ...

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
        """A whole file. Raises FileNotFoundError, and StoreError for a pipe, a device or a folder in its place."""
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

    def create_store(self, fill: Callable[[Path], None]) -> bool:
        """Make the store of the files that ``fill`` puts into a new folder: it appears whole or not at all.

        False when another process has made it meanwhile. Raises OSError when a folder has something in it already, and
        StoreError when an object store holds files of another store.
        """
        ...

    def free_bytes(self) -> int | None:
        """Free bytes on the disk that it is or will be on; None in an object store."""
        ...

    def lock(self, *, shared: bool) -> AbstractContextManager[None]:
        """Hold the store for writing, alone or (``shared``) beside other shared writers.

        Raises StoreError when another process holds it in a way that does not go with this one.
        """
        ...

    def lock_creation(self) -> AbstractContextManager[None]:
        """Wait until no other process makes this store, and keep others from it."""
        ...

    def lock_file(self, key: str) -> AbstractContextManager[None]:
        """Wait until no other process holds the file ``key``, and hold it; it is gone afterwards."""
        ...

    def remove_stale_locks(self, folder: str) -> None:
        """Delete files of ``lock_file`` in ``folder`` that nobody holds: a process that was killed left them."""
        ...


Where = str | Path | Storage
