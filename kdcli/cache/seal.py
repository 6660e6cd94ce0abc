"""A checksum inside a JSON document: the manifest and the journal decide how bytes are read, so a flipped bit must show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcli.cache.schema import digest
from kdcli.errors import StoreError

SEAL = "sha256"


def seal(document: Mapping[str, Any]) -> dict[str, Any]:
    """``document`` with the sha256 of its canonical JSON in the field ``sha256``."""
    plain = {k: v for k, v in document.items() if k != SEAL}
    return {**plain, SEAL: digest(plain)}


def unseal(document: Any, what: str) -> dict[str, Any]:
    """``document`` without its checksum. Raises StoreError, naming it ``what``, when it is not what was written."""
    if isinstance(document, dict):
        plain = {k: v for k, v in document.items() if k != SEAL}
        if document.get(SEAL) == digest(plain):
            return plain
    raise StoreError(f"{what} is not what was written: its checksum is wrong")
