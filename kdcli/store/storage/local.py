"""Where the files of a store are: a folder, or an object store. Every file is there whole or not at all.

Keys are paths inside the store with ``/``. Writers and readers go through here, so that what a store is does not depend
on where it is.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kdcli.errors import OptionError
from kdcli.files import atomic_write_bytes, fsync_folder

SCHEMES = ("s3", "gs", "az")


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


class Place(Protocol):
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


Where = str | Path | Place


def place_of(where: Where) -> Place:
    """The place that a user named: ``s3://``, ``gs://`` and ``az://`` are object stores, everything else is a folder.

    Raises OptionError for another kind of URL, for one without a bucket, and when obstore is not installed.
    """
    if not isinstance(where, str | Path):
        return where
    text = str(where)
    if isinstance(where, Path):
        if text.startswith(tuple(f"{scheme}:/" for scheme in SCHEMES)):
            raise OptionError(f"'{text}': a Path folds the slashes of a URL; pass it as a str")
        return Folder(where)
    if not is_url(text):
        return Folder(Path(text))
    from kdcli.store.storage.object_store import Remote

    return Remote(text.rstrip("/"))


def is_url(text: str) -> bool:
    """Whether a store is named by a URL. Raises OptionError for one that no store can have."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", text, re.DOTALL)
    if found and (found[1] not in SCHEMES or not found[2].strip("/")):
        raise OptionError(f"'{text}' names no store; give a folder, or s3://BUCKET/PREFIX, gs://… or az://…")
    return found is not None


def absolute(text: str) -> str:
    """A folder's absolute path; a URL as it is."""
    return text if is_url(text) else str(Path(text).resolve())


class Folder:
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
