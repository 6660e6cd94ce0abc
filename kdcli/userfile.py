"""Runs a Python file of the user's, named on the command line, once, and says in one line what went wrong in it.

A store, a run folder or a config file may speak of a file too; none of them makes it run (docs/security.md).
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from itertools import count
from pathlib import Path
from types import ModuleType

from kdcli.errors import KDError, MissingPathError, OptionError, UsageError

_numbers = count()  # two files may have the same name
_named: set[Path] = set()  # resolved
_modules: dict[Path, ModuleType] = {}  # by resolved path: a command asks for a file several times, and means one class


def name(file: Path) -> None:
    """``file`` was named on the command line, or by who calls kdcli from Python: it may be run."""
    _named.add(file.resolve())


def run_file(what: str, file: Path) -> ModuleType:
    """The module that ``file`` makes, the same one however often this process asks; ``what`` begins the messages.

    Raises UsageError for a file that was not named to this process, and with the line for one that fails; MissingPathError
    for one that is not there, OptionError for one that is not Python.
    """
    path = file.resolve()
    if path not in _named:
        raise UsageError(
            f"{what} '{file}' is named by a file and not by you, and kdcli runs no code that a store, a run or a config "
            f"names; if you trust it, name it: kdcli --plugin '{file}' ..."
        )
    if path in _modules:
        return _modules[path]
    if not path.is_file():
        raise MissingPathError(f"{what} '{file}' does not exist; name a Python file")
    if path.suffix != ".py":
        raise OptionError(f"{what} '{file}' is not a .py file")
    spec = importlib.util.spec_from_file_location(f"kdcli_user_{next(_numbers)}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and get_type_hints look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        kind = "" if isinstance(error, KDError) else f"{type(error).__name__}: "
        raise UsageError(f"{what} '{file}' failed{_place(error, path)}: {kind}{message}") from error
    _modules[path] = module
    return module


def _place(error: Exception, path: Path) -> str:
    """`` in line 3 (import nothing)``: the line of the file itself, whoever raised below it."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f" in line {error.lineno} ({(error.text or '').strip()})"
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" in line {own[-1].lineno} ({own[-1].line})" if own else ""
