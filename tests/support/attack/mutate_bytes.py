"""Damage to the bytes of a file, and files that are none: each drawn from a generator, so that a number names a case."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 104857600\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not Found</body></html>\n"

Mutator = Callable[[Random, bytes], bytes]


def flip(rng: Random, data: bytes) -> bytes:
    """One bit."""
    changed = bytearray(data or b"\0")
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flips(rng: Random, data: bytes) -> bytes:
    """Up to fifty bytes become others."""
    changed = bytearray(data or b"\0")
    for _ in range(rng.randint(2, 50)):
        changed[rng.randrange(len(changed))] ^= rng.randint(1, 255)
    return bytes(changed)


def zero(rng: Random, data: bytes) -> bytes:
    """A block of zeros, as a disk that lost a page."""
    start = rng.randrange(max(1, len(data)))
    size = rng.randint(1, max(1, min(4096, len(data) - start)))
    return data[:start] + bytes(size) + data[start + size :]


def truncate(rng: Random, data: bytes) -> bytes:
    """The end is missing, up to all of it."""
    return data[: rng.choice([0, 1, len(data) - 1, rng.randrange(max(1, len(data)))])]


def lengthen(rng: Random, data: bytes) -> bytes:
    """Something behind the end."""
    return data + rng.choice([b"\0", b"\n", bytes(4096), rng.randbytes(100), data])


def swap(rng: Random, data: bytes) -> bytes:
    """Two blocks change places."""
    size = rng.randint(1, max(1, len(data) // 4))
    a = rng.randrange(max(1, len(data) - 2 * size + 1))
    b = rng.randint(a + size, max(a + size, len(data) - size))
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def insert(rng: Random, data: bytes) -> bytes:
    """Bytes too many in the middle."""
    at = rng.randint(0, len(data))
    return data[:at] + rng.randbytes(rng.randint(1, 20)) + data[at:]


def another(rng: Random, data: bytes) -> bytes:
    """Another file altogether."""
    return rng.choice([HTML, LFS, b"{}", b"[]", b"null", b"\x1f\x8b\x08\0", rng.randbytes(500), b"\xff\xfe" + data])


MUTATORS: tuple[Mutator, ...] = (flip, flip, flips, zero, truncate, lengthen, swap, insert, another)


def damage(rng: Random, path: Path) -> str:
    """Change the bytes of ``path`` with a drawn mutator; what was done, or "" when the file is as it was."""
    before = path.read_bytes()
    mutator = rng.choice(MUTATORS)
    after = mutator(rng, before)
    path.write_bytes(after)
    return "" if after == before else f"{mutator.__name__} {path.name}"


def replace_by_no_file(rng: Random, path: Path) -> str:
    """Something that is no regular file in the place of ``path``; what it is."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    kind = rng.choice(["pipe", "folder", "device", "loop", "nowhere", "missing"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.symlink_to({"device": "/dev/zero", "loop": path.name, "nowhere": "/nowhere/at/all"}[kind])
    return f"{kind} instead of {path.name}"
