"""What a file is by its first bytes: for the message about one that stands where weights or a picture should be."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

HEAD = 512  # bytes; tar has its mark at 257

A_TEXT = "a text", ""  # that says nothing of where it comes from

_LFS = b"version https://git-lfs.github.com/spec/"
_UNPACK, _AGAIN = "unpack it", "download it again"
# place, bytes there -> what such a file is, and what to do about it where that does not depend on what was wanted
_MARKS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, _LFS, "a Git-LFS pointer", "fetch the file itself with git lfs pull"),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ", "an xz archive", _UNPACK),
    (0, b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (0, b"Rar!", "a rar archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x00\x05\x16\x07", "macOS's notes on another file", "leave out files whose name begins with ._"),
    (0, b"\x89HDF\r\n", "an HDF5 file", ""),
    (4, b"TFL3", "a TensorFlow Lite model", ""),
    (0, b"GGUF", "a GGUF model", ""),
    (0, b"\x93NUMPY", "a NumPy array", ""),
    (0, b"\x89PNG\r\n", "a PNG picture", ""),
    (0, b"\xff\xd8\xff", "a JPEG picture", ""),
    (0, b"GIF8", "a GIF picture", ""),
    (0, b"8BPS", "a Photoshop file", ""),
    (0, b"%PDF", "a PDF document", ""),
    (0, b"%!PS", "a PostScript drawing", ""),
    (0, b"\x7fELF", "a program", ""),
    (0, b"MZ", "a program", ""),
    (0, b"\x00\x00\x00\x00\x02\x00\x00\x00\x05\x00\x00\x00", "weights of Darknet (YOLO)", ""),
)
_BOXES = {b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"hevc": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC"}
_BOXES |= {b"avif": "AVIF", b"avis": "AVIF"}


def name_file(path: Path) -> tuple[str, str] | None:
    """(what ``path`` is, what to do about it or ""), such as ``("a Git-LFS pointer", "fetch ...")``; None: not known."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head.startswith(b"PK\x03\x04"):
        return _name_zip(path)
    return name_bytes(head, size)


def name_bytes(head: bytes, size: int) -> tuple[str, str] | None:
    """`name_file` of the first ``HEAD`` bytes of a file of ``size`` bytes; zip archives are not looked into."""
    if not size:
        return "an empty file", "copy it again"
    if not head.strip(b"\0"):
        return "nothing but zeros", "copy it again"
    for place, mark, name, fix in _MARKS:
        if head.startswith(mark, place):
            return name, fix
    if head[4:8] == b"ftyp" and head[8:12] in _BOXES:
        return f"a picture in {_BOXES[head[8:12]]}", "save it as JPEG or PNG"
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < size:
        return "a safetensors file", "save it again with torch.save(safetensors.torch.load_file(FILE), NEW)"
    if head[:1] == b"\x08" and 0 < head[1] <= 32 and head[2:3] == b"\x12":  # ir_version, producer_name
        return "an ONNX model", ""
    return _name_text(head)


def _name_text(head: bytes) -> tuple[str, str] | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if re.match(rb"<(!doctype html|html|head|body)", text):
        return "an HTML page", f"a download gave a page in its place: {_AGAIN}"
    if text.startswith((b"<?xml", b"<svg", b"<!--")):
        return ("an SVG drawing", "save it as PNG") if b"<svg" in text else ("an XML text", "")
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        try:
            head.decode("utf-8", "strict" if len(head) < HEAD else "ignore")
        except UnicodeDecodeError:
            return None
        return A_TEXT
    return None


def _name_zip(path: Path) -> tuple[str, str] | None:
    """A zip archive that is no file of torch.save; None for one that is, or is cut off."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError):
        return None
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner and any(part.startswith("code/") for part in inner):
        return "a TorchScript archive", "save the state_dict() of the model that it was made from"
    if "data.pkl" in inner:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays", ""
    if "model.weights.h5" in names:
        return "a Keras model", ""
    return f"a zip archive of {len(names)} files", _UNPACK
