"""What ``--out`` and its like may name, looked at before the work whose result is to lie there."""

from __future__ import annotations

import os
from pathlib import Path

from kdcli.errors import OptionError


def require_folder(path: Path, flag: str) -> None:
    """Raises OptionError when ``path`` is no folder that can be made or written to. Makes nothing."""
    if path.exists() and not path.is_dir():
        raise OptionError(f"{flag} '{path}' is not a folder; name a folder to write to")
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise OptionError(f"{flag} '{path}' lies below '{place}', which is not a folder; name another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OptionError(f"{flag} '{path}': nothing can be written to '{place}'; name another place")


def require_file(path: Path, flag: str, suffix: str = "") -> None:
    """Raises OptionError when ``path`` is no file that can be made or replaced, or does not end in ``suffix``."""
    if path.is_dir():
        raise OptionError(
            f"{flag} '{path}' is a folder; name a file{f' that ends in {suffix}' if suffix else ''} in it"
        )
    if suffix and path.suffix.lower() != suffix:
        raise OptionError(f"{flag} '{path}' does not end in {suffix}; name it '{path.with_suffix(suffix)}'")
    require_folder(path.parent, f"the folder of {flag}")
