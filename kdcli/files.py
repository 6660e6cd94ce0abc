"""Files that are there whole or not at all: a temporary file in the same folder, fsync, rename, fsync of the folder.

A reader, or a process started after a crash, sees the old content or the new, never half of it. What is no regular file is
never replaced, and never read: a named pipe in the place of a file hangs whoever opens it, a device has no end. PyTorch
files are read with ``weights_only=True`` alone, so that a foreign file cannot run code.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import platform
import re
import stat
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from kdcli.errors import MissingPathError, NoSpaceError, OptionError
from kdcli.filetypes import name_file

# what a file system says that cannot sync a folder, or anything: an extra safety against a power cut, and no reason to stop
NO_SYNC = (
    errno.EINVAL,
    errno.EBADF,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
)
NO_REPLACE = (errno.EEXIST, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EXDEV)
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"  # whose process numbers those in temporary names are
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


class NotAFileError(OSError):
    """A named pipe, a device or a folder is where a file has to be."""


def open_regular(path: Path) -> int:
    """A descriptor for reading a regular file. Raises OSError, and NotAFileError for what is none: for a named pipe at once,
    instead of waiting for its writer.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # the flag changes nothing for a regular file
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        kind = kind_of(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        raise NotAFileError(errno.EINVAL, f"is {kind}, not a file", str(path))
    return descriptor


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file. Raises as ``open_regular``."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read()


def kind_of(mode: int) -> str:
    """What ``st_mode`` says that a path is, in words."""
    kinds = [
        (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a disk"), (stat.S_ISSOCK, "a socket"), (stat.S_ISREG, "a file"),
    ]  # fmt: skip
    return next((words for fits, words in kinds if fits(mode)), "something else")


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed ``atomic_*`` call left anywhere below ``folder``, whose only writer we are."""
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink()


def require_beside(path: Path) -> None:
    """Raises OptionError when nothing can be made beside ``path``: a folder is filled there before a rename."""
    parent = path.absolute().parent
    if parent.is_dir() and not os.access(parent, os.W_OK | os.X_OK):
        inside = f", e.g. '{path / 'new'}'" if path.is_dir() else ""
        raise OptionError(
            f"'{path}' is filled beside its place, and nothing can be written to '{parent}'; name a folder in one that can be "
            f"written{inside}"
        )


class ForeignObjectsError(OptionError):
    """A file holds objects beside tensors and plain values. They are not made, whatever they are."""


class Inert:
    """Stands in a loaded file for an object of another library that is not made: it ignores what it is given."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


# What mmcv, mmengine and training loops put beside the weights. Only the names are known here: nothing is imported or called.
INERT = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.config.config.ConfigDict",
    "builtins.getattr",  # how a HistoryBuffer names its methods
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)


def load_torch(path: Path, *, what: str, foreign: bool = False) -> Any:
    """Read a file of ``torch.save`` to the CPU without unpickling anything but tensors and plain values.

    ``what`` names the file in errors, e.g. ``"checkpoint"``. ``foreign``: of another library; what INERT names is an
    ``Inert`` in what is returned. Raises MissingPathError, ForeignObjectsError, or OptionError for a file that is no such
    file, naming it for what it is. Bytes of tensors are not checked by PyTorch: a flipped bit in one is read as data.
    """
    import torch

    if not path.is_file():
        raise MissingPathError(f"{what} '{path}': no such file")
    try:
        _require_no_bomb(path, what)
        with warnings.catch_warnings(), torch.serialization.safe_globals([(Inert, n) for n in INERT if foreign]):
            warnings.simplefilter("ignore")  # torch's, on a pickle protocol that it then refuses or reads
            return torch.load(path, map_location="cpu", weights_only=True)
    except OptionError:
        raise
    except Exception as error:  # a torn or foreign file fails in the zip reader, the unpickler or a constructor
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which PyTorch makes of a file that is cut off
            raise
        raise _no_torch_file(path, what, error) from error


def _require_no_bomb(path: Path, what: str) -> None:
    """PyTorch takes memory for what an entry claims to unpack to; torch.save packs nothing, so that it is in the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeDecodeError):
        return  # an old file, or none
    if claimed > path.stat().st_size:
        raise OptionError(
            f"{what} '{path}': claims to unpack to {claimed} bytes, more than it has; load it where it was made and write "
            "it again with torch.save"
        )


def _no_torch_file(path: Path, what: str, error: Exception) -> OptionError:
    said = f"{what} '{path}': not a PyTorch file of plain tensors"
    text = str(error)
    if match := re.search(r"GLOBAL ([^\s]+)", text):  # torch's word for a name in a pickle
        named = match[1][:100].encode("unicode_escape").decode()
        if named.startswith(("ultralytics.", "models.yolo", "models.common")):
            return OptionError(f"{said}: a model of Ultralytics ({named}), which kdcli cannot read")
        return ForeignObjectsError(f"{said}: it holds {named}, and kdcli makes no objects of a file")
    known = name_file(path)
    if known is not None:
        name, fix = known
        return OptionError(f"{said} but {name}{f'; {fix}' if fix else '; name a file of torch.save'}")
    unpickler = re.search(r"WeightsUnpickler error: (.*)", text)
    reason = unpickler[1] if unpickler else text.split("\n", 1)[0]
    return OptionError(f"{said}, or torn ({reason.strip()[:120] or type(error).__name__}); copy or save it again")


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    path = Path(os.path.realpath(path))  # a link stays, and its target is replaced: /dev/stdout is one
    if _written_through(path, write):
        return
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")
    try:
        _remove_of_the_dead(path)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            _sync(file.fileno(), path)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        if error.errno in FULL:
            raise NoSpaceError(f"{path}: the disk is full; free some space or choose another place") from error
        if error.errno in NO_REPLACE:
            raise OptionError(
                f"{path}: the file system of '{path.parent}' cannot rename a file to replace another ({error.strerror}), so "
                "that a crash would leave half of it; choose a folder on another disk"
            ) from error
        # names the file that was asked for, not the temporary one, which means nothing to anybody
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _remove_of_the_dead(path: Path) -> None:
    """Delete what killed processes of this machine left when they were writing ``path``."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{_HOST}-*.tmp"):
        number = leftover.name.rpartition("-")[2].removesuffix(".tmp")
        if number.isdecimal() and not Path(f"/proc/{number}").exists() and Path("/proc/self").exists():
            leftover.unlink(missing_ok=True)


def _written_through(path: Path, write: Callable[[BinaryIO], object]) -> bool:
    """Write into a pipe or a terminal such as /dev/null, which a rename would replace. False for what is none.

    Raises OSError for a disk, a socket, a folder, and a pipe that nobody reads.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:  # not there yet, or not to be seen: making the file will say why
        return False
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # a rename onto a folder fails
        return False
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise OSError(errno.EINVAL, f"is {kind_of(mode)}, which is not overwritten", str(path))
    data = io.BytesIO()
    write(data)
    # a pipe without a reader is an error at once; with one it may be slow
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data.getbuffer())
    return True


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable, where the file system can: after a rename, the file survives a power cut too."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
        return
    try:
        _sync(descriptor, folder)
    finally:
        os.close(descriptor)


def _sync(descriptor: int, path: Path) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise OSError(error.errno, error.strerror, str(path)) from error  # of its own it names nothing
