"""A store in a folder of a local or mounted disk: files are replaced by a rename, locks are the kernel's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path

from kdcli.errors import StoreError
from kdcli.files import NotAFileError, atomic_write_bytes, fsync_folder, open_regular, read_regular, require_beside
from kdcli.store.locks import lock_file, lock_store, remove_stale_locks
from kdcli.store.storage.base import OpenFile

MAX_OPEN_FILES = 256  # a COCO-sized store has 10,000 shard files, a process may usually open 1,024
# zarr-python's faster pipeline, where it is installed: 2.3 times as many LD rows a second (docs/decisions/0001)
ZARRS = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"} if find_spec("zarrs") else {}


class LocalStorage:
    """The store in the folder ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def folder(self) -> Path | None:
        """See Storage."""
        return self.path

    @property
    def max_open(self) -> int:
        """See Storage."""
        return MAX_OPEN_FILES

    @property
    def zarr_config(self) -> Mapping[str, str]:
        """See Storage."""
        return ZARRS

    def local_folder(self, verb: str) -> Path:
        """See Storage."""
        return self.path

    def exists(self) -> bool:
        """See Storage."""
        return self.path.exists()

    def has(self, key: str) -> bool:
        """See Storage."""
        return (self.path / key).exists()

    def open_all(self, keys: Sequence[str], tail: int) -> list[OpenFile | None]:
        """See Storage."""
        return [self._open(key, tail) for key in keys]

    def read_ranges(self, ranges: Sequence[tuple[OpenFile, int, int]]) -> list[bytes]:
        """See Storage. With pread: processes and threads may share an open file."""
        found = []
        for file, start, length in ranges:
            try:
                found.append(os.pread(file.descriptor, length, start))
            except OSError as error:  # of its own it names nothing
                raise OSError(error.errno, error.strerror, str(self.path / file.key)) from error
        return found

    def read(self, key: str) -> bytes:
        """See Storage."""
        try:
            return read_regular(self.path / key)
        except NotAFileError as error:
            raise _no_file(error) from error

    def read_all(self, keys: Sequence[str]) -> list[bytes]:
        """See Storage."""
        return [self.read(key) for key in keys]

    def write(self, key: str, data: bytes) -> None:
        """See Storage. Raises NoSpaceError when the disk is full."""
        file = self.path / key
        new = [folder for folder in file.parents if not folder.is_dir()]
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in new:
            fsync_folder(folder.parent)
        for leftover in file.parent.glob(f".{file.name}.*.tmp"):  # of a killed process: a file has one writer at a time
            leftover.unlink(missing_ok=True)
        atomic_write_bytes(file, data)

    def create(self, key: str, data: bytes) -> bool:
        """See Storage. For one process at a time: on a disk there are locks."""
        if self.has(key):
            return self.read(key) == data
        self.write(key, data)
        return True

    def delete(self, key: str) -> None:
        """See Storage."""
        (self.path / key).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        """See Storage."""
        path = self.path / folder
        return sorted(f.name for f in path.iterdir() if f.name[0] != ".") if path.is_dir() else []

    def for_zarr(self) -> Path:
        """See Storage."""
        return self.path

    def create_store(self, fill: Callable[[Path], None]) -> bool:
        """See Storage. A folder beside the store's is filled, synced and renamed."""
        staging = self.path.with_name(f".{self.path.name}.creating")
        shutil.rmtree(staging, ignore_errors=True)
        staging.parent.mkdir(parents=True, exist_ok=True)
        try:
            fill(staging)
            for folder, _, _ in os.walk(staging):
                fsync_folder(Path(folder))
            staging.rename(self.path)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        fsync_folder(self.path.parent)
        return True

    def free_bytes(self) -> int | None:
        """See Storage."""
        folder = self.path.absolute()
        while not folder.exists():
            folder = folder.parent
        try:
            return shutil.disk_usage(folder).free
        except OSError:  # a file system that does not say
            return None

    def lock(self, *, shared: bool) -> AbstractContextManager[None]:
        """See Storage."""
        return lock_store(self.path, shared=shared)

    @contextmanager
    def lock_creation(self) -> Iterator[None]:
        """See Storage. The lock lies beside the folder, which is not there yet."""
        lock = self.path.with_name(f".{self.path.name}.lock")
        left = lock.exists() and os.access(lock.parent, os.W_OK)  # by one that was killed when it had made it
        if (self.path / "zarr.json").is_file() and not left:  # nobody makes it, and its parent may be read-only
            yield
            return
        require_beside(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(lock):
            yield

    def lock_file(self, key: str) -> AbstractContextManager[None]:
        """See Storage."""
        return lock_file(self.path / key)

    def remove_stale_locks(self, folder: str) -> None:
        """See Storage."""
        remove_stale_locks(self.path / folder)

    def _open(self, key: str, tail: int) -> OpenFile | None:
        try:
            descriptor = open_regular(self.path / key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except NotAFileError as error:
            raise _no_file(error) from error
        size = os.fstat(descriptor).st_size
        return OpenFile(key, size, os.pread(descriptor, tail, max(0, size - tail)), descriptor=descriptor)


def _no_file(error: NotAFileError) -> StoreError:
    return StoreError(f"'{error.filename}' {error.strerror}; delete it and run `kdcli cache verify`")
