"""From what ``--method`` and ``--set`` say to methods, their options and what they read."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from kdcli import userfile
from kdcli.errors import OptionError, UsageError, did_you_mean
from kdcli.geometry.regions import RegionSpec
from kdcli.limits import MAX_FLOAT
from kdcli.methods import METHODS
from kdcli.methods.base import Method, Pair, method_options
from kdcli.options import convert
from kdcli.tensors import BACKBONE, BOX_DISTRIBUTION, BOX_REGRESSION, DERIVED, FEATURES, Need

FACTORS = ("vlr", "cls", "loc")  # options that scale a term and are not called a weight
LEAST_DIVISOR = 1e-6  # 1e-45 and less is 0 as a float32


_users: dict[str, Path] = {}  # files of the methods of the user's that were named to this process, by class


def name_methods(text: str) -> None:
    """``text`` is what the user says of methods, on the command line or from Python: the files in it may be run."""
    for path, _, class_name in (part.strip().rpartition(":") for part in text.split(",")):
        if path:
            name_method(Path(path), class_name)


def name_method(file: Path, class_name: str) -> None:
    """The user has named ``file``, which has the method ``class_name``."""
    userfile.name(file)
    _users[class_name] = file


def stored_methods(text: str) -> tuple[str, ...]:
    """``--method`` as a store keeps it: of a user's method the class alone, ``:Mine``, as no file may name code."""
    parts = [part.strip().rpartition(":") for part in text.split(",")] if text else []
    return tuple(f"{colon}{name}" for _, colon, name in parts)


def absolute_methods(text: str) -> str:
    """``--method`` with the paths of a user's files made absolute."""
    parts = [part.strip().rpartition(":") for part in text.split(",")] if text else []
    return ",".join(f"{Path(path).resolve()}:{name}" if path else f"{colon}{name}" for path, colon, name in parts)


def find_methods(text: str) -> dict[str, type[Method]]:
    """Read a comma list such as ``ld,pfi`` or ``ld,./mine.py:Mine``. A user's method is named by its class, lower case.

    A store's ``:Mine`` is the class of a file that was named to this process.

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
            raise OptionError(f"unknown method '{part}'{did_you_mean(part, METHODS)}")
        if name in found:
            raise OptionError(f"method '{name}' is named twice in '{text}'")
        found[name] = method
    return found


def _load(part: str) -> tuple[str, type[Method]]:
    path_text, _, class_name = part.rpartition(":")
    path = Path(path_text) if path_text else _users.get(class_name)
    if path is None:
        raise UsageError(
            f"method '{class_name}' is from a file of somebody's, which no store names; if you trust it, name it: "
            "kdcli --plugin FILE ..."
        )
    module = userfile.run_file("method file", path)
    method = getattr(module, class_name, None)
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise OptionError(f"'{part}': {path} has no class {class_name} derived from kdcli.methods.base.Method")
    return class_name.lower(), method


def require_known(tables: Iterable[str], methods: Mapping[str, type[Method]]) -> None:
    """Raises OptionError for a ``[methods.NAME]`` table of a method that is not run: it would do nothing."""
    for table in tables:
        if table not in methods:
            there = f"--method names {', '.join(methods)}" if methods else "there is no --method"
            raise OptionError(f"[methods.{table}] is not used: {there}{did_you_mean(table, methods)}")


def require_table(table: str, choices: Collection[str]) -> None:
    """Raises OptionError for a table of ``--set TABLE.OPTION=VALUE`` that is none of ``choices``."""
    if table not in choices:
        raise OptionError(f"--set {table}.…: unknown table '{table}'{did_you_mean(table, choices)}")


def method_tables(text: str, tables: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The ``--set`` tables of a command that has tables of methods alone. Raises OptionError for another one.

    ``text``: what ``--method`` says.
    """
    known = find_methods(text) if text else {}
    for table in tables:
        require_table(table, known)
    return {table: dict(values) for table, values in tables.items()}


def resolve_all(
    methods: Mapping[str, type[Method]], detector: str | tuple[str, ...], given: Mapping[str, Mapping[str, Any]],
    regions: RegionSpec | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """``resolve_options`` of each method, with its table of ``given``, if it has one."""
    return {
        name: resolve_options(name, method, detector, given.get(name, {}), regions) for name, method in methods.items()
    }


def all_needs(methods: Mapping[str, type[Method]], options: Mapping[str, Mapping[str, Any]]) -> tuple[Need, ...]:
    """What ``methods`` read together under their resolved ``options``, sorted: what a store for all of them holds."""
    return tuple(sorted({need for name, method in methods.items() for need in method.reads(options[name])}))


def completed(method: type[Method], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that an earlier kdcli resolved, with those that have come since: their defaults leave everything as it was."""
    return {**{name: p.default for name, p in method_options(method).items()}, **options}


def resolve_options(
    name: str, method: type[Method], detector: str | tuple[str, ...], given: Mapping[str, Any],
    regions: RegionSpec | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All options of a method: its defaults, those for ``detector`` (the first of several names that has some), then what
    was ``given``.

    ``regions``: the detector's own, which its region options start from. Raises OptionError for an unknown option, with
    the nearest name, for a value of the wrong type, and for a number that no loss can use.
    """
    known = method_options(method)
    for option in given:
        if option not in known:
            raise OptionError(f"unknown option '{name}.{option}'{did_you_mean(option, known)}")
    resolved = {n: p.default for n, p in known.items()}
    if regions is not None:
        resolved |= {o: getattr(regions, o) for o in method.region_options if hasattr(regions, o)}
    names = (detector,) if isinstance(detector, str) else detector
    resolved |= dict(next((method.defaults[n] for n in names if n in method.defaults), {}))
    hints = typing.get_type_hints(method.__init__)
    for option, value in given.items():
        if option not in hints:
            raise OptionError(f"option '{name}.{option}' of {method.__name__}.__init__ has no type hint; write one")
        resolved[option] = convert(f"{name}.{option}", value, hints[option])
    for option, value in resolved.items():
        if value is inspect.Parameter.empty:
            raise OptionError(f"option '{name}.{option}' has no default; give one with --set {name}.{option}=VALUE")
        _check_number(f"{name}.{option}", value)
    weights = [v for o, v in resolved.items() if o.endswith("weight") and isinstance(v, float)]
    if weights and not any(weights):
        raise OptionError(f"method '{name}' has no term: all its weights are 0; leave it out, or set one")
    return resolved


def _check_number(option: str, value: Any) -> None:
    """Weights push towards the teacher, never away; a temperature or a reference divides."""
    if not isinstance(value, float):
        return
    if not abs(value) <= MAX_FLOAT:
        raise OptionError(f"{option} = {value}: must be a finite number, at most {MAX_FLOAT:g}")
    if (option.endswith("weight") or option.rpartition(".")[2] in FACTORS) and value < 0:
        raise OptionError(f"{option} = {value}: must not be negative")
    if option.endswith(("temperature", "batch_ref")) and value <= 0:
        raise OptionError(f"{option} = {value}: must be above 0")
    if option.endswith(("temperature", "batch_ref")) and value < LEAST_DIVISOR:
        raise OptionError(f"{option} = {value}: must be at least {LEAST_DIVISOR:g}")


def check_pair(
    name: str, method: type[Method], options: Mapping[str, Any], pair: Pair, student: str, teacher: str
) -> None:
    """Raise OptionError when ``student`` or ``teacher`` (model names) lacks a tensor that the method needs."""
    for need in method.reads(options):
        wanted = DERIVED.get(need.name, need.name)
        for side, model, specs in (("student", student, pair.student), ("teacher", teacher, pair.teacher)):
            if wanted not in specs:
                box = wanted == BOX_DISTRIBUTION and BOX_REGRESSION in specs
                fix = "train it with --set model.box=distribution; " if box else ""
                raise OptionError(
                    f"method '{name}' needs {wanted}, which the {side} {model} does not give; {fix}"
                    f"`kdcli methods` lists which detectors each method works on"
                )
        if wanted != FEATURES and wanted not in BACKBONE:
            ours, theirs = pair.student[wanted].dims, pair.teacher[wanted].dims
            if ours != theirs:
                raise OptionError(
                    f"method '{name}' compares {wanted} element by element: student {student} has {list(ours)}, "
                    f"teacher {teacher} has {list(theirs)}; they must agree"
                )
