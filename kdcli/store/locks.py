"""Who may write a folder: one process alone, or several that take shards. Locks end with their process.

Why not filelock: docs/decisions/0021.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdcli.errors import KDError, StoreError

# what a file system without locks says: Lustre without its option "flock", NFS without its lock service, some of FUSE
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@contextmanager
def lock_store(path: Path, *, shared: bool) -> Iterator[None]:
    """Hold the folder ``path`` for writing, alone or (``shared``) beside other shared writers.

    Raises StoreError when another process holds it in a way that does not go with this one. Without locks in the file system
    one writer goes on with a warning, and several are a StoreError.
    """
    busy = StoreError(f"'{path}' is being written by another process; wait for it, or choose another --out")
    with lock_folder(path, busy, shared=shared) as locked:
        if not locked and shared:
            raise StoreError(
                f"the file system of '{path}' has no file locks, which several writers need: write it in one process, without "
                "--shard and torchrun, or on another disk (Lustre has them when mounted with -o flock)"
            )
        yield


@contextmanager
def lock_folder(path: Path, busy: KDError, *, shared: bool = False) -> Iterator[bool]:
    """Hold the folder ``path``, alone or ``shared``; False where the file system has no locks: alone, it warns.

    Raises ``busy`` when another process holds it.
    """
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            locked = _flock(folder, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB, path)
        except BlockingIOError:
            raise busy from None
        if not locked and not shared:
            warnings.warn(
                f"the file system of '{path}' has no file locks: nothing keeps a second process from writing there at the "
                "same time; run one alone",
                stacklevel=2,
            )
        yield locked
    finally:
        os.close(folder)


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder below ``parent`` that is gone afterwards; those that killed processes left are deleted first."""
    for old in parent.glob(f"{prefix}*"):
        _remove_unheld(old)
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, path)
            held = path.exists()  # else another process took it for one that was left, before it was locked
        except BlockingIOError:
            held = False
        if held:
            break
        os.close(descriptor)
    try:
        yield path
    finally:
        shutil.rmtree(path)
        os.close(descriptor)


def _remove_unheld(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # gone meanwhile, or somebody else's
        return
    try:
        if _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, folder):  # without locks nobody can tell
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:  # its holder removes it
        pass
    finally:
        os.close(descriptor)


@contextmanager
def lock_file(file: Path) -> Iterator[None]:
    """Wait until no other process holds ``file``, and hold it; the file is gone afterwards.

    Without locks in the file system it holds nothing: see ``lock_store``.
    """
    while True:
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
        _flock(descriptor, fcntl.LOCK_EX, file)
        try:
            ours = os.stat(file).st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:  # locked, but removed by its holder: nobody else would wait for it
            ours = False
        if ours:
            break
        os.close(descriptor)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def remove_stale_locks(folder: Path, pattern: str = ".*.lock") -> None:
    """Delete the files of ``lock_file`` in ``folder`` that nobody holds: a process that was killed left them."""
    for file in folder.glob(pattern):
        try:
            descriptor = os.open(file, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, file)
            file.unlink(missing_ok=True)
        except BlockingIOError:  # its holder removes it
            pass
        finally:
            os.close(descriptor)


def _flock(descriptor: int, how: int, path: Path) -> bool:
    """``fcntl.flock``; False when the file system has none. Raises BlockingIOError."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise OSError(error.errno, error.strerror, str(path)) from error  # of its own it names nothing
        return False
    return True
