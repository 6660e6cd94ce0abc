"""From what a user named to the storage that it is: a folder or an object store."""

from __future__ import annotations

import re
from pathlib import Path

from kdcli.errors import OptionError
from kdcli.store.storage.base import Storage, Where
from kdcli.store.storage.local import LocalStorage

SCHEMES = ("s3", "gs", "az")


def open_storage(where: Where) -> Storage:
    """The storage that a user named: ``s3://``, ``gs://`` and ``az://`` are object stores, everything else is a folder.

    Raises OptionError for another kind of URL, for one without a bucket, and when obstore is not installed.
    """
    if not isinstance(where, str | Path):
        return where
    text = str(where)
    if isinstance(where, Path):
        if text.startswith(tuple(f"{scheme}:/" for scheme in SCHEMES)):
            raise OptionError(f"'{text}': a Path folds the slashes of a URL; pass it as a str")
        return LocalStorage(where)
    if not is_url(text):
        return LocalStorage(Path(text))
    from kdcli.store.storage.object_store import ObjectStorage

    return ObjectStorage(text.rstrip("/"))


def is_url(text: str) -> bool:
    """Whether a store is named by a URL. Raises OptionError for one that no store can have."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", text, re.DOTALL)
    if found and (found[1] not in SCHEMES or not found[2].strip("/")):
        raise OptionError(f"'{text}' names no store; give a folder, or s3://BUCKET/PREFIX, gs://… or az://…")
    return found is not None


def absolute(text: str) -> str:
    """A folder's absolute path; a URL as it is."""
    return text if is_url(text) else str(Path(text).resolve())
