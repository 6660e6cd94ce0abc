"""Damaged files: bytes flipped and cut, values of other kinds, numbers and nestings that nobody writes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

OTHERS: tuple[Any, ...] = (
    None, True, -1, 0, 7, 0.5, 10**30, -(2**63) - 1, 1e308, float("nan"), float("inf"), "", "x", "\0", "\ud800", "\x1b[2J",
    "a" * 5000, [], [1, "a"], {}, {"a": {"b": 1}}, [[[[[[]]]]]],
)  # fmt: skip
DEPTH = 100_000
BROKEN = (
    b"",
    b"\0" * 64,
    b"\xff\xfe{",
    b"[]",
    b"7",
    b'"x"',
    b"null",
    b"{}",
    b"version https://git-lfs.github.com/spec/v1\n",
)
NESTED = (
    b'{"a":' * DEPTH,
    b"[" * DEPTH,
    b"a = " + b"[" * DEPTH,
    b'{"ap": ' + b"9" * 6000 + b"}",
    b"a = " + b"9" * 6000,
)


def flips(data: bytes, count: int, draw: random.Random) -> Iterator[bytes]:
    """``data`` with one bit changed, ``count`` times, and cut at as many places."""
    for _ in range(count):
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        yield bytes(changed)
        yield data[: draw.randrange(len(data))]


def other_values(value: Any) -> Iterator[Any]:
    """``value``, of JSON's kinds, with each part in turn taken out or replaced by a value of ``OTHERS``."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {k: v for k, v in value.items() if k != key}
            for other in OTHERS:
                yield {**value, key: other}
            for changed in other_values(inner):
                yield {**value, key: changed}
    elif isinstance(value, list):
        for place, inner in enumerate(value[:3]):
            for other in OTHERS:
                yield [*value[:place], other, *value[place + 1 :]]
            for changed in other_values(inner):
                yield [*value[:place], changed, *value[place + 1 :]]


def as_json(value: Any) -> bytes:
    """JSON as Python writes it, NaN and lone surrogates too."""
    return json.dumps(value).encode()
