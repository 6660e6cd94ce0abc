"""Where the files of a store are: a folder, or an object store. Every file is there whole or not at all.

Keys are paths inside the store with ``/``. Writers and readers go through here, so that what a store is does not depend
on where it is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from kdcli.files import atomic_write_bytes, fsync_folder
from kdcli.store.storage.base import OpenFile


class LocalStorage:
    """A place on a local or mounted disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        """See Place."""
        return self.path.exists()

    def has(self, key: str) -> bool:
        """See Place."""
        return (self.path / key).exists()

    def open_all(self, keys: Sequence[str], tail: int) -> list[OpenFile | None]:
        """See Place."""
        return [self._open(key, tail) for key in keys]

    def read_ranges(self, ranges: Sequence[tuple[OpenFile, int, int]]) -> list[bytes]:
        """See Place. With pread: processes and threads may share an open file."""
        return [os.pread(file.descriptor, length, start) for file, start, length in ranges]

    def read(self, key: str) -> bytes:
        """See Place."""
        return (self.path / key).read_bytes()

    def read_all(self, keys: Sequence[str]) -> list[bytes]:
        """See Place."""
        return [self.read(key) for key in keys]

    def write(self, key: str, data: bytes) -> None:
        """See Place. Raises NoSpaceError when the disk is full."""
        file = self.path / key
        new = [folder for folder in file.parents if not folder.is_dir()]
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in new:
            fsync_folder(folder.parent)
        for leftover in file.parent.glob(f".{file.name}.*.tmp"):  # of a killed process: a file has one writer at a time
            leftover.unlink(missing_ok=True)
        atomic_write_bytes(file, data)

    def create(self, key: str, data: bytes) -> bool:
        """See Place. For one process at a time: on a disk there are locks."""
        if self.has(key):
            return self.read(key) == data
        self.write(key, data)
        return True

    def delete(self, key: str) -> None:
        """See Place."""
        (self.path / key).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        """See Place."""
        path = self.path / folder
        return sorted(f.name for f in path.iterdir() if f.name[0] != ".") if path.is_dir() else []

    def for_zarr(self) -> Path:
        """See Place."""
        return self.path

    def _open(self, key: str, tail: int) -> OpenFile | None:
        try:
            descriptor = os.open(self.path / key, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            os.close(descriptor)
            return None
        size = state.st_size
        return OpenFile(key, size, os.pread(descriptor, tail, max(0, size - tail)), descriptor=descriptor)
