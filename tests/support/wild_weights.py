"""Files that people have where weights should be, made without the libraries that write them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import struct
import sys
import tarfile
import types
import zipfile
from collections.abc import Mapping

import numpy as np
import torch


def saved(content: object, *, old: bool = False) -> bytes:
    """``torch.save`` as bytes; ``old``: not as a zip."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def zipped(files: Mapping[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def unzipped(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def of_pickle(program: bytes) -> bytes:
    """A file of torch.save with a pickle made by hand."""
    return zipped({"a/data.pkl": program, "a/version": b"3\n", "a/byteorder": b"little"})


def object_of(path: str) -> object:
    """An object of a class that is not installed, such as ``ultralytics.nn.tasks.DetectionModel``."""
    module, _, name = path.rpartition(".")
    parts = module.split(".")
    for k in range(len(parts)):
        sys.modules.setdefault(".".join(parts[: k + 1]), types.ModuleType(".".join(parts[: k + 1])))
    made = type(name, (), {"__module__": module, "__qualname__": name})
    setattr(sys.modules[module], name, made)
    thing: object = made()
    return thing


def message_hub() -> object:
    """What mmengine puts beside the weights of a training: a HistoryBuffer of numpy arrays that names its own methods."""
    buffer = object_of("mmengine.logging.history_buffer.HistoryBuffer")

    def least() -> None: ...

    least.__module__, least.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer.min"
    type(buffer).min = staticmethod(least)  # type: ignore[attr-defined]
    state = {"_log_history": np.arange(3.0), "max_length": 9, "statistics_methods": {"min": least, "x": np.float32(2)}}
    vars(buffer).update(state)
    return {"log_scalars": {"loss": buffer}}


def foreign_files() -> dict[str, tuple[bytes, str]]:
    """name -> (bytes, what the message calls them)."""
    plain = saved({"w": torch.ones(1000)})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        entry = tarfile.TarInfo("model.pth")
        entry.size = len(plain)
        tar.addfile(entry, io.BytesIO(plain))
    arrays = io.BytesIO()
    np.savez(arrays, a=np.ones(3))
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 167309\n"
    return {
        "lfs": (pointer, "a Git-LFS pointer; fetch the file itself with git lfs pull"),
        "page": (b"<!DOCTYPE html>\n<html><head><title>404", "an HTML page; a download gave a page in its place"),
        "late page": (b"\n\n <html lang=en>", "an HTML page"),
        "marked page": (b"\xef\xbb\xbf<!doctype HTML>", "an HTML page"),
        "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied", "an XML text"),
        "json": (b'{"error": "not found"}', "a text"),
        "empty": (b"", "an empty file; copy it again"),
        "zeros": (bytes(5000), "nothing but zeros"),
        "gz": (gzip.compress(plain), "a gzip archive; unpack it"),
        "bz2": (bz2.compress(plain), "a bzip2 archive; unpack it"),
        "xz": (lzma.compress(plain), "an xz archive; unpack it"),
        "tar": (packed.getvalue(), "a tar archive; unpack it"),
        "zip": (zipped({"model.pth": plain, "config.py": b""}), "a zip archive of 2 files; unpack it"),
        "keras": (zipped({"config.json": b"{}", "model.weights.h5": b""}), "a Keras model"),
        "npz": (arrays.getvalue(), "an archive of NumPy arrays"),
        "jit": (
            zipped({"m/data.pkl": b"", "m/constants.pkl": b"", "m/code/a.py": b"", "m/version": b"3"}),
            "a TorchScript archive; save the state_dict()",
        ),
        "h5": (b"\x89HDF\r\n\x1a\n" + bytes(range(90)), "an HDF5 file"),
        "tflite": (b"\x1c\0\0\0TFL3" + bytes(range(90)), "a TensorFlow Lite model"),
        "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(90), "an ONNX model"),
        "safetensors": (struct.pack("<Q", len(header)) + header + bytes(4), "a safetensors file; save it again with"),
        "darknet": (struct.pack("<iii", 0, 2, 5) + bytes(range(90)), "weights of Darknet (YOLO)"),
        "png": (b"\x89PNG\r\n\x1a\n" + bytes(90), "a PNG picture"),
        "apple": (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "macOS's notes on another file"),
        "cut": (plain[:-10], "or torn"),
        "cut in half": (plain[: len(plain) // 2], "or torn"),
        "pickle": (pickle.dumps({"w": [1]}, 4), "or torn"),
        "bomb": (
            zipped({**unzipped(plain), "archive/data/0": bytes(2**28)}, zipfile.ZIP_DEFLATED),
            f"claims to unpack to {2**28 + sum(len(v) for k, v in unzipped(plain).items() if k != 'archive/data/0')} bytes",
        ),
        "yolo": (saved({"model": object_of("ultralytics.nn.tasks.DetectionModel")}), "a model of Ultralytics"),
        "old yolo": (saved({"model": object_of("models.yolo.Model")}, old=True), "a model of Ultralytics"),
        "whole": (saved(torch.nn.Linear(2, 2)), "it holds torch.nn.modules.linear.Linear"),
        "evil": (of_pickle(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00exit\x85R."), "it holds os.system"),
        "escape": (of_pickle(b"\x80\x02c\x1b[2J\nx\n."), r"it holds \x1b[2J.x"),
    }
