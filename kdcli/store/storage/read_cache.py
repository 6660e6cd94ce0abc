"""Chunks of object stores, kept on a local disk: a folder of bounded size that any number of processes may share.

A file is one chunk, which ends in its own crc32c: it is checked on each read, so a file that is torn or has a flipped bit
is no more than a missing one. Files that were not read for longest go first.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from kdcli.errors import NoSpaceError, OptionError
from kdcli.files import FULL
from kdcli.store.checksums import crc_is_right

FOLDER, SIZE = "KDCLI_READ_CACHE", "KDCLI_READ_CACHE_GB"
SIZE_GB = 20.0
PARTS = 64  # folders, each with its share of the bound: making room looks at one of them


class ReadCache:
    """Chunks by name in ``folder``, at most ``limit`` bytes on the disk, but for what each process wrote just now."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._share = limit // PARTS
        self._written: dict[Path, int] = {}  # since we last looked at that part

    @staticmethod
    def from_environment() -> ReadCache | None:
        """The cache that KDCLI_READ_CACHE names, of KDCLI_READ_CACHE_GB (20); None when it does not."""
        folder = os.environ.get(FOLDER)
        if not folder:
            return None
        text = os.environ.get(SIZE, str(SIZE_GB))
        try:
            return ReadCache(Path(folder), int(float(text) * 2**30))
        except (ValueError, OverflowError) as error:
            raise OptionError(f"{SIZE}='{text}' is not a number of GB") from error

    def get(self, name: str) -> bytes | None:
        """A chunk; None when it is not there, or not what was kept."""
        file = self._file(name)
        try:
            data = file.read_bytes()
            if crc_is_right(data):
                os.utime(file)
                return data
            file.unlink()
        except FileNotFoundError:  # never kept, or another process made room at this moment
            return None
        return None

    def put(self, name: str, chunk: bytes) -> None:
        """Keep a chunk, if it is whole. A full disk is no error: room is made for the next one."""
        if not crc_is_right(chunk):
            return
        file = self._file(name)
        part = file.parent
        temporary = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            part.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(chunk)
            os.replace(temporary, file)  # not fsynced: a torn file is found by its checksum
        except FileNotFoundError:  # another process made room and took it: what nobody keeps is fetched again
            return
        except OSError as error:
            if error.errno not in FULL or isinstance(error, NoSpaceError):
                raise
            temporary.unlink(missing_ok=True)
            self._make_room(part)
            return
        self._written[part] = self._written.get(part, 0) + _on_disk(len(chunk))
        if self._written[part] > self._share // 8:
            self._make_room(part)

    def _make_room(self, part: Path) -> None:
        """Remove the files of ``part`` that were not read for longest, until an eighth of its share is free."""
        self._written[part] = 0
        files = []
        for entry in os.scandir(part):
            try:
                state = entry.stat()
            except FileNotFoundError:  # another process makes room too
                continue
            files.append((state.st_mtime_ns, _on_disk(state.st_size), entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._share - self._share // 8:
                break
            Path(path).unlink(missing_ok=True)
            total -= size

    def _file(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self._folder / f"{int(digest[:4], 16) % PARTS:02d}" / digest


def _on_disk(size: int) -> int:
    return -(-size // 4096) * 4096  # small files take a block
