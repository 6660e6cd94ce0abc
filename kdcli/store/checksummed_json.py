"""A checksum inside a JSON document: the manifest and the journal decide how bytes are read, so a flipped bit must show.

It finds damage, not malice: anyone can compute it. ``validation`` is for what a document says.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from kdcli.errors import StoreError
from kdcli.untrusted import parse_json

CHECKSUM_FIELD = "sha256"
CAPITAL_ESCAPE = re.compile(rb"(?<!\\)(?:\\\\)*\\u[0-9a-f]{0,3}[A-F]")  # of "\u00E9"; a backslash may be escaped itself


def add_checksum(document: Mapping[str, Any]) -> dict[str, Any]:
    """``document`` with the sha256 of its canonical JSON in the field ``sha256``."""
    plain = {k: v for k, v in document.items() if k != CHECKSUM_FIELD}
    return {**plain, CHECKSUM_FIELD: digest(plain)}


def verify_checksum(document: Any, what: str) -> dict[str, Any]:
    """``document`` without its checksum. Raises StoreError, naming it ``what``, when it is not what was written."""
    if isinstance(document, dict):
        plain = {k: v for k, v in document.items() if k != CHECKSUM_FIELD}
        if document.get(CHECKSUM_FIELD) == digest(plain):
            return plain
    raise StoreError(f"{what} is not what was written: its checksum is wrong")


def parse(data: bytes) -> Any:
    """The JSON of a manifest or a journal file. Raises ValueError for what Python's ``json`` does not write.

    The checksum is of the values, and a flipped bit may spell the same ones otherwise: 1e-05 as 1E-05, \\u00e9 as \\u00E9.
    NaN and Infinity are refused: nothing that is measured or counted here may be one. So is what ``parse_json`` refuses.
    """
    if CAPITAL_ESCAPE.search(data):
        raise ValueError("an escape in capital letters")
    return parse_json(data, parse_float=_float, parse_constant=_refuse)


def _float(text: str) -> float:
    value = float(text)
    if repr(value) != text:
        raise ValueError(f"the number {text[:40]} is spelt otherwise")
    return value


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is no number")


def digest(data: Any) -> str:
    """sha256 of the canonical JSON of ``data``."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
