"""Files that are there whole or not at all: a temporary file in the same folder, fsync, rename, fsync of the folder.

A reader, or a process started after a crash, sees the old content or the new, never half of it. PyTorch files are read
with ``weights_only=True`` alone, so that a foreign file cannot run code.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from kdcli.errors import MissingPathError, NoSpaceError, OptionError

FULL = (errno.ENOSPC, errno.EDQUOT)  # error numbers of a full disk


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, replacing what is there. Raises NoSpaceError when the disk is full."""
    _replace(path, lambda file: file.write(data))


def atomic_write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8 with its line ends as they are. Raises NoSpaceError when the disk is full."""
    atomic_write_bytes(path, text.encode())


def atomic_save(obj: object, path: Path) -> None:
    """``torch.save`` of ``obj`` to ``path``. Raises NoSpaceError when the disk is full."""
    import torch

    def write(file: BinaryIO) -> None:
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # the zip writer's own complaint hides the full disk
                raise error.__context__ from None
            raise

    _replace(path, write)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed ``atomic_*`` call left anywhere below ``folder``, whose only writer we are."""
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink()


def load_torch(path: Path, *, what: str) -> Any:
    """Read a file of ``torch.save`` to the CPU without unpickling anything but tensors and plain values.

    ``what`` names the file in errors, e.g. ``"checkpoint"``. Raises MissingPathError, or OptionError for a file that
    is no such file. Bytes of tensors are not checked by PyTorch: a flipped bit in one is read as data.
    """
    import torch

    if not path.is_file():
        raise MissingPathError(f"{what} '{path}': no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn or foreign file fails in the zip reader, the unpickler or a constructor
        if (
            isinstance(error, OSError) and error.errno != errno.EINVAL
        ):  # EINVAL: torn, its zip directory points before it
            raise
        reason = str(error).split("\n", 1)[0][:120] or type(error).__name__
        raise OptionError(f"{what} '{path}': not a PyTorch file of plain tensors, or torn ({reason})") from error


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        if error.errno in FULL:
            raise NoSpaceError(f"{path}: the disk is full; free some space or choose another place") from error
        # names the file that was asked for, not the temporary one, which means nothing to anybody
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable: after a rename, the file survives a power cut too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
