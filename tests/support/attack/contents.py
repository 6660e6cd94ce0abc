"""What a file says, where its bytes may differ without that: files of torch, and results with times in them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch

# columns of results.csv that a clock or the operating system decides
MEASURED = {"images_per_s", "data_wait_percent", "teacher_percent", "epoch_s", "peak_memory_bytes"}


def losses(path: Path) -> str:
    """results.csv without what is measured."""
    _require_file(path)
    rows = csv.DictReader(io.StringIO(path.read_text()))
    return json.dumps([{k: v for k, v in row.items() if k not in MEASURED} for row in rows])


def environment(path: Path) -> str:
    """env.json without the second in which the run began, which two runs may share, and the digest over it."""
    _require_file(path)
    return json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in ("started", "digest")})


def checkpoint(path: Path) -> str:
    """sha256 of the tensors and values of a checkpoint."""
    _require_file(path)
    found = hashlib.sha256()  # not of the bytes: they also tell which strings were one object when it was saved
    _add(torch.load(path, weights_only=True), found)
    return found.hexdigest()


def _require_file(path: Path) -> None:
    """Raises ValueError for a pipe, a device or a folder, which this process must not read."""
    if not path.is_file():
        raise ValueError(f"{path.name} is no file")


def _add(value: Any, found: Any) -> None:
    if isinstance(value, torch.Tensor):
        found.update(f"{value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, dict):
        for key, item in value.items():
            found.update(repr(key).encode())
            _add(item, found)
    elif isinstance(value, (list, tuple)):
        found.update(b"[")
        for item in value:
            _add(item, found)
        found.update(b"]")
    else:
        found.update(repr(value).encode())
