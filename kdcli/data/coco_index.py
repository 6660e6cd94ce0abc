"""COCO annotations as compact arrays, parsed once and kept as an index under the hash of the file.

The first parse of a 118,000-image JSON takes seconds and much memory, so it runs in a child process
(``python -m kdcli.data.coco_index JSON OUT PARENT``), and its result is one ``.npz`` that later opens read in a fraction of a
second. The index is only a cache: whatever is wrong with it, the JSON is parsed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcli.classes import Category, ClassList
from kdcli.data.coco_parse import parse_coco
from kdcli.errors import DataError, MissingPathError, NoSpaceError, OptionError
from kdcli.files import atomic_write_bytes, open_regular
from kdcli.processes import end_with, parent_gone

INDEX_FORMAT = 1
CHILD_FROM_BYTES = 20_000_000  # a smaller JSON parses in about a second and 150 MB, less trouble than a process
HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, eq=False, kw_only=True)
class Annotations:
    """One COCO file: I images in the order of their ids, their M boxes image by image, K categories in id order.

    The boxes of image ``i`` are rows ``box_offsets[i]`` to ``box_offsets[i + 1]`` in the order of the file. Images that
    share an id are all here; the boxes of that id belong to the first.
    """

    image_ids: NDArray[np.int64]  # [I] ascending
    heights: NDArray[np.int32]  # [I] pixels
    widths: NDArray[np.int32]  # [I] pixels
    name_bytes: NDArray[np.uint8]  # all file names, utf-8, one after the other
    name_offsets: NDArray[np.int64]  # [I + 1] into name_bytes
    box_offsets: NDArray[np.int64]  # [I + 1]
    boxes_xywh: NDArray[np.float64]  # [M, 4] image pixels
    category: NDArray[np.int32]  # [M] 0..K-1, -1 for a category that the file does not list
    crowd: NDArray[np.bool_]  # [M]
    area: NDArray[np.float64]  # [M] square pixels, of the mask where there is one
    annotation_ids: NDArray[np.int64]  # [M]
    orphans: NDArray[np.int64]  # [O, 2] annotation id and image id of annotations whose image is not listed
    categories: ClassList
    sha256: str  # of the JSON file, hexadecimal
    dropped: tuple[Category, ...] = ()  # categories without boxes that had the name of another one

    def file_name(self, i: int) -> str:
        """The ``file_name`` of image ``i``, as written in the file."""
        start, end = self.name_offsets[i : i + 2]
        return self.name_bytes[start:end].tobytes().decode("utf-8")


ARRAYS = (
    *("image_ids", "heights", "widths", "name_bytes", "name_offsets", "box_offsets", "boxes_xywh", "category", "crowd"),
    *("area", "annotation_ids", "orphans"),
)


def load_annotations(path: Path) -> Annotations:
    """Read a COCO JSON, from the index when this very file was read before.

    Raises MissingPathError, DataError (one line) when the file is no COCO detection JSON, and NoSpaceError when a large
    file needs the child process and neither the cache folder nor /tmp can be written.
    """
    try:
        sha256 = _hash_file(path)
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise MissingPathError(f"annotation file {path} does not exist") from error
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read ({error.strerror})") from error
    folder = index_dir()
    index = None if folder is None else folder / f"{sha256}.npz"
    known = None if index is None else _load_index(index, sha256)
    if known is not None:
        return known
    parsed = _parse_in_child(path, index) if size >= CHILD_FROM_BYTES else _parse_here(path, index)
    if parsed.sha256 != sha256:
        raise DataError(f"annotation file {path} changed while it was read; run again")
    return parsed


def index_dir() -> Path | None:
    """Where indices are kept: ``$KDCLI_CACHE``, ``$XDG_CACHE_HOME/kdcli`` or ``~/.cache/kdcli``, folder ``index``.

    None for a user without a home: nothing is kept then.
    """
    own, xdg = os.environ.get("KDCLI_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(own) if own else (Path(xdg) if xdg else Path.home() / ".cache") / "kdcli"
    except RuntimeError:  # no HOME, and no entry in the system's list of users
        return None
    return root / "index"


def _parse_here(path: Path, index: Path | None) -> Annotations:
    parsed = _annotations(parse_coco(path))
    if index is None:
        return parsed
    with contextlib.suppress(OSError, OptionError):  # a read-only home: the index only saves time
        _save_index(parsed, index)
    return parsed


def _parse_in_child(path: Path, index: Path | None) -> Annotations:
    """Have a child parse ``path``, so that its memory is given back; without a place for the index, through /tmp."""
    with contextlib.suppress(OSError):
        if index is not None:
            index.parent.mkdir(parents=True, exist_ok=True)
            return _run_child(path, index)
    with tempfile.TemporaryDirectory(prefix="kdcli-") as folder:
        return _run_child(path, Path(folder) / "index.npz")


def _run_child(path: Path, index: Path) -> Annotations:
    """Parse in a child, which writes ``index``. Raises DataError, or NoSpaceError if ``index`` cannot be written."""
    package_root = str(Path(__file__).resolve().parents[2])  # the child finds kdcli even where it is not installed
    paths = os.pathsep.join(p for p in (package_root, os.environ.get("PYTHONPATH", "")) if p)
    child = subprocess.run(
        [sys.executable, "-m", "kdcli.data.coco_index", str(path), str(index), str(os.getpid())],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    last_line = (child.stderr.strip().splitlines() or ["no message"])[-1]
    if child.returncode == DataError.exit_code:
        raise DataError(last_line)
    if child.returncode == NoSpaceError.exit_code:
        raise NoSpaceError(last_line)
    if child.returncode != 0:
        hint = "; killed, probably for memory" if child.returncode < 0 else ""
        raise DataError(f"annotation file {path}: parsing stopped with {child.returncode}{hint} ({last_line})")
    written = _load_index(index, None)
    if written is None:
        raise NoSpaceError(f"the annotation index {index} cannot be read back; set KDCLI_CACHE to a folder with space")
    return written


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with os.fdopen(open_regular(path), "rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _annotations(arrays: dict[str, NDArray[Any]]) -> Annotations:
    header = json.loads(arrays["header"].tobytes())
    categories = ClassList(Category(id_, name) for id_, name in header["categories"])
    return Annotations(
        **{name: arrays[name] for name in ARRAYS}, categories=categories, dropped=(), sha256=header["sha256"]
    )


def _save_index(annotations: Annotations, index: Path) -> None:
    """Write atomically: another process sees the whole index or none."""
    header = {
        "format": INDEX_FORMAT,
        "sha256": annotations.sha256,
        "categories": [[c.id, c.name] for c in annotations.categories],
    }
    arrays = {name: getattr(annotations, name) for name in ARRAYS}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    index.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **arrays)
    atomic_write_bytes(index, data.getvalue())


def _load_index(index: Path, sha256: str | None) -> Annotations | None:
    """The index, or None when it is not there, damaged, of another format, or of another file than ``sha256``."""
    try:
        with index.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in (*ARRAYS, "header")}
        header = json.loads(arrays["header"].tobytes())
        if header["format"] != INDEX_FORMAT or (sha256 is not None and header["sha256"] != sha256):
            return None
        return _annotations(arrays)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None  # a cache: it is rebuilt from the JSON


def main(arguments: list[str]) -> int:
    """The child process: JSON OUT PARENT. Exit code 3 for wrong data, 5 when OUT cannot be written, and one line on stderr."""
    source, target, parent = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    end_with(lambda: parent_gone(parent))
    try:
        parsed = _annotations(parse_coco(source))
    except DataError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    try:
        _save_index(parsed, target)
    except OSError as error:
        sys.stderr.write(f"no place for the annotation index {target} ({error.strerror}); set KDCLI_CACHE\n")
        return NoSpaceError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
