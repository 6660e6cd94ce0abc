"""Who may write a folder: one process alone, or several that take shards. Locks end with their process.

Why not filelock: docs/decisions/0021.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdcli.errors import KDError, StoreError


@contextmanager
def lock_store(path: Path, *, shared: bool) -> Iterator[None]:
    """Hold the folder ``path`` for writing, alone or (``shared``) beside other shared writers.

    Raises StoreError when another process holds it in a way that does not go with this one.
    """
    with lock_folder(path, StoreError(f"'{path}' is being written by another process; wait for it, or choose another --out"),
        shared=shared,
    ):  # fmt: skip
        yield


@contextmanager
def lock_folder(path: Path, busy: KDError, *, shared: bool = False) -> Iterator[None]:
    """Hold the folder ``path``, alone or ``shared``. Raises ``busy`` when another process holds it."""
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        yield
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
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:  # its holder removes it
        pass
    finally:
        os.close(descriptor)


@contextmanager
def lock_file(file: Path) -> Iterator[None]:
    """Wait until no other process holds ``file``, and hold it; the file is gone afterwards."""
    while True:
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
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


def remove_stale_locks(folder: Path) -> None:
    """Delete the files of ``lock_file`` in ``folder`` that nobody holds: a process that was killed left them."""
    for file in folder.glob(".*.lock"):
        try:
            descriptor = os.open(file, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink(missing_ok=True)
        except BlockingIOError:  # its holder removes it
            pass
        finally:
            os.close(descriptor)
