"""Detectors and methods of a user's own, from files that the user names: ``kdcli --plugin FILE`` or KDCLI_PLUGINS.

Such a file defines ``DETECTORS`` or ``METHODS``, or both; what they hold is added for this process. Nothing else ever
leads to a file being run but ``--method FILE:CLASS``: a checkpoint names its detector and a store the class of a method,
never a path, and the path in a run's config.toml runs only when it is named again (docs/security.md).
docs/extending.md tells how to write one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from kdcli import userfile
from kdcli.detectors.base import Detector
from kdcli.detectors.build import DETECTORS, detector_names
from kdcli.detectors.dense.recipes import Recipe
from kdcli.detectors.two_stage.recipes import TwoStageRecipe
from kdcli.errors import OptionError
from kdcli.methods import METHODS
from kdcli.methods.base import Method
from kdcli.methods.resolve import name_method
from kdcli.tensors import Need

NAME = re.compile(r"[a-z][a-z0-9_]*")  # goes into --model, --method (a comma list with colons) and --set TABLE.KEY
SET_TABLES = ("model", "optim", "train")  # what --set reaches beside the methods


def load(files: Iterable[Path]) -> None:
    """Run each of ``files`` and add its DETECTORS and METHODS to this process.

    Raises MissingPathError for a file that is not there, UsageError with the line for one that fails, OptionError for a
    name that exists and for what is neither a recipe nor a class of the right kind; then nothing of that file is added.
    """
    for file in files:
        userfile.name(file)
        module = userfile.run_file("plugin", file)
        detectors, methods = _table(file, module, "DETECTORS"), _table(file, module, "METHODS")
        own = [v for v in vars(module).values() if _is_class(v, Method) and v.__module__ == module.__name__]
        for method in own:  # what --method FILE:CLASS said when a store or a run was made
            name_method(file, method.__name__)
        if not detectors and not methods and not own:
            raise OptionError(f"plugin '{file}' adds nothing: define DETECTORS or METHODS, names to recipes or classes")
        # a file that is named again, by the flag and by the environment, gives what is there already
        detectors = {name: value for name, value in detectors.items() if DETECTORS.get(name) is not value}
        methods = {name: value for name, value in methods.items() if METHODS.get(name) is not value}
        for name, value in detectors.items():
            _check_detector(f"plugin '{file}': detector '{name}'", name, value)
        for name, value in methods.items():
            _check_method(f"plugin '{file}': method '{name}'", name, value)
        DETECTORS.update(detectors)
        METHODS.update(methods)


def _table(file: Path, module: ModuleType, table: str) -> dict[str, Any]:
    """What a plugin's ``table`` holds; nothing when it has none."""
    found = getattr(module, table, {})
    if not isinstance(found, dict):
        raise OptionError(f"plugin '{file}': {table} is a {type(found).__name__}; it must be a dictionary")
    for name in found:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise OptionError(f"plugin '{file}': {table} has the name {name!r}; use a-z, 0-9 and _, a letter first")
    return found


def _check_detector(what: str, name: str, value: Any) -> None:
    if name in detector_names():
        raise OptionError(f"{what} exists already; choose another name")
    if not isinstance(value, (Recipe, TwoStageRecipe)) and not _is_class(value, Detector):
        raise OptionError(
            f"{what} is {_kind(value)}; it must be a Recipe, a TwoStageRecipe or a class derived from "
            "kdcli.detectors.base.Detector"
        )


def _check_method(what: str, name: str, value: Any) -> None:
    if name in METHODS:
        raise OptionError(f"{what} exists already; choose another name")
    # methods become children of a torch module, which has attributes of its own
    if name in SET_TABLES or hasattr(nn.ModuleDict(), name):
        raise OptionError(f"{what}: the name means something else to --set or to torch; choose another name")
    if not _is_class(value, Method):
        raise OptionError(f"{what} is {_kind(value)}; it must be a class derived from kdcli.methods.base.Method")
    for attribute in ("title", "evidence", "offline"):  # `kdcli methods` shows them
        if not isinstance(getattr(value, attribute, None), str):
            raise OptionError(f"{what}: class {value.__name__} has no {attribute}; see kdcli.methods.base.Method")
    needs = getattr(value, "needs", None)
    if not isinstance(needs, tuple) or not all(isinstance(need, Need) for need in needs):
        raise OptionError(f"{what}: class {value.__name__} has no needs; write needs = (Need(name, region), ...)")


def _is_class(value: Any, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base) and value is not base


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"
