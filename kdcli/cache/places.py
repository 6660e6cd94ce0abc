"""Where the files of a store are: a folder. Every file is there whole or not at all.

Keys are paths inside the store with ``/``. Writers and readers go through here, so that what a store is does not depend
on where it is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from kdcli.files import atomic_write_bytes, fsync_folder


class OpenFile(Protocol):
    """A file that is open for random reads."""

    size: int

    def read(self, start: int, length: int) -> bytes:
        """Bytes from ``start`` on; fewer than ``length`` at the end of the file."""
        ...


class Place(Protocol):
    """The files of one store. ``str()`` names it in messages."""

    def open(self, key: str) -> OpenFile:
        """Open a file for reading. Raises FileNotFoundError."""
        ...

    def read(self, key: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Replace a file: its readers see the old bytes or the new ones, and it survives a power cut."""
        ...

    def delete(self, key: str) -> None:
        """Remove a file that may not be there."""
        ...

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files directly in ``folder``, without hidden ones; none when it is not there."""
        ...


class Folder:
    """A place on a local or mounted disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def open(self, key: str) -> LocalFile:
        """See Place."""
        return LocalFile(self.path / key)

    def read(self, key: str) -> bytes:
        """See Place."""
        return (self.path / key).read_bytes()

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

    def delete(self, key: str) -> None:
        """See Place."""
        (self.path / key).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        """See Place."""
        path = self.path / folder
        return sorted(f.name for f in path.iterdir() if f.name[0] != ".") if path.is_dir() else []


class LocalFile:
    """An open file of a Folder, read with pread: processes and threads may share it."""

    def __init__(self, file: Path) -> None:
        self._descriptor = os.open(file, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, start: int, length: int) -> bytes:
        """See OpenFile."""
        return os.pread(self._descriptor, length, start)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
