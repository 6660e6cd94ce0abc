"""The distillation methods, one file each. Adding one = that file + one line here."""

from __future__ import annotations

from pathlib import Path

from kdcli.errors import OptionError, nearest
from kdcli.methods.base import Method
from kdcli.methods.bckd import BCKD
from kdcli.methods.cwd import CWD
from kdcli.methods.defeat import DeFeat
from kdcli.methods.defeat_thin import DeFeatThin
from kdcli.methods.drkd import DRKD, DRKDLite
from kdcli.methods.fgd import FGD
from kdcli.methods.ld import LD
from kdcli.methods.pfi import PFI
from kdcli.methods.pkd import PKD
from kdcli.methods.rm import RM
from kdcli.userfile import run_file

METHODS: dict[str, type[Method]] = {
    "ld": LD,
    "rm": RM,
    "pfi": PFI,
    "defeat": DeFeat,
    "defeat_thin": DeFeatThin,
    "bckd": BCKD,
    "drkd": DRKD,
    "drkd_lite": DRKDLite,
    "cwd": CWD,
    "pkd": PKD,
    "fgd": FGD,
}


def find_methods(text: str) -> dict[str, type[Method]]:
    """Read a comma list such as ``ld,pfi`` or ``ld,./mine.py:Mine``. A user's method is named by its class, lower case.

    Raises OptionError for an unknown name (with the nearest), MissingPathError for a file that is not there, UsageError
    for one that fails.
    """
    found: dict[str, type[Method]] = {}
    for part in (p.strip() for p in text.split(",")):
        if ":" in part:
            name, method = _load(part)
        elif part in METHODS:
            name, method = part, METHODS[part]
        else:
            raise OptionError(f"unknown method '{part}'{nearest(part, METHODS)}")
        if name in found:
            raise OptionError(f"method '{name}' is named twice in '{text}'")
        found[name] = method
    return found


def _load(part: str) -> tuple[str, type[Method]]:
    path_text, _, class_name = part.rpartition(":")
    path = Path(path_text)
    module = run_file("method file", path)
    method = getattr(module, class_name, None)
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise OptionError(f"'{part}': {path} has no class {class_name} derived from kdcli.methods.base.Method")
    return class_name.lower(), method
