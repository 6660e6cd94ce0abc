"""The files of a run folder as checked values: every field that anything reads has its kind here, and nowhere else.

A run folder may be old, damaged or made by others. What is wrong raises OptionError, ``<file> <reason>``; ``kdcli compare``
leaves the run out, ``--resume`` ends with it. Fields that are not listed may be anything, since nothing reads them.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from kdcli.digest import digest_of, is_intact
from kdcli.errors import MissingPathError, OptionError
from kdcli.untrusted import parse_json, parse_toml

LARGEST = 2**63  # of any number in these files: beyond it no counter of ours goes, and torch takes no seed

# Fields of config.toml that say where things are that are known by their contents, or how the work is spread over the machine:
# a person may have to change them by hand where a run goes on on another one.
NOT_BOUND = frozenset({"data", "cache", "teacher", "device", "workers", "threads", "save_steps", "gradient_limit"})
PLACES = ("backbone_weights", "init_from")  # of files that were read before the first step: bound by their name alone

Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return type(value) is str and "\0" not in value  # no path has one


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= LARGEST


def _count(value: Any) -> bool:
    return _number(value) and value >= 0


def _percent(value: Any) -> bool:
    return _number(value) and 0 <= value <= 100


def _whole(value: Any) -> bool:
    return type(value) is int and -LARGEST <= value < LARGEST


def _natural(value: Any) -> bool:
    return _whole(value) and value >= 0


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _method(value: Any) -> bool:
    return _text(value) or _texts(value)


def _model(value: Any) -> bool:
    return _text(value) or (isinstance(value, dict) and _text(value.get("name", "")))


def _device(value: Any) -> bool:
    return _text(value) and re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d{1,3})?", value) is not None


def _command(value: Any) -> bool:
    return value in ("train", "distill")


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _table_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(_text(k) and check(v) for k, v in value.items())


CONFIG: Mapping[str, Check] = {
    "command": _command, "seed": _whole, "epochs": _natural, "model": _model, "method": _method, "canvas": _text,
    **dict.fromkeys(("data", "teacher", "cache", "backbone_weights", "init_from"), _text),
    "device": _device,
    **dict.fromkeys(("workers", "threads", "save_steps"), _natural), "gradient_limit": _count,
}  # fmt: skip

ENV: Mapping[str, Check] = {
    **dict.fromkeys(("kdcli", "python", "platform", "hardware", "started", "settings"), _text),
    **dict.fromkeys(("data_sha256", "store", "teacher_sha256", "teacher"), _or_none(_text)),
    "versions": _table_of(_text), "argv": _texts, "threads": _natural, "seed": _whole,
}  # fmt: skip

METRICS: Mapping[str, Check] = {
    **dict.fromkeys(
        ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l", "ar", "best_ap", "teacher_ap"), _or_none(_percent)
    ),
    "epochs": _natural,
    "wall_s": _count,
    **dict.fromkeys(
        ("seconds_per_epoch", "images_per_s", "train_images_per_s", "data_wait_percent"), _or_none(_count)
    ),
    **dict.fromkeys(("best_epoch", "peak_memory_bytes", "store_bytes", "parameters"), _or_none(_natural)),
    "per_class": _table_of(_or_none(_percent)), "approximations": _texts, "weights_sha256": _table_of(_text),
    "results": _text, "run": _or_none(_text),
}  # fmt: skip


def read_settings(run: Path) -> dict[str, Any]:
    """``config.toml`` as a table. Raises MissingPathError, or OptionError for what is none or has a value of another kind."""
    return _checked(run / "config.toml", CONFIG, parse_toml)


def read_environment(run: Path) -> dict[str, Any]:
    """``env.json``, as it was when the run began. Raises as ``read_settings``."""
    return _checked(run / "env.json", ENV, parse_json)


def read_metrics(run: Path) -> dict[str, Any]:
    """``metrics.json``, the final numbers. Raises as ``read_settings``; MissingPathError: the run is unfinished."""
    metrics = _checked(run / "metrics.json", METRICS, parse_json)
    missing = [name for name in ("ap", "epochs", "wall_s") if name not in metrics]
    if missing:
        raise OptionError(f"metrics.json has no {missing[0]}")
    return metrics


def read_history(run: Path) -> tuple[dict[str, float], ...]:
    """Rows of ``results.csv`` by epoch, without empty cells; an epoch written twice (a resumed run) counts as written last.

    None without the file. Raises OptionError for what is no such table.
    """
    if not (run / "results.csv").exists():
        return ()
    rows: dict[float, dict[str, float]] = {}
    try:
        for line in csv.DictReader(_read_text(run / "results.csv").splitlines()):
            row = {key: float(cell) for key, cell in line.items() if key is not None and cell}
            if not all(map(_number, row.values())) or not row["epoch"].is_integer():
                raise ValueError(f"line {len(rows) + 2} has no finite number")
            rows[row["epoch"]] = row
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"results.csv cannot be read ({_reason(error)})") from error
    return tuple(rows[epoch] for epoch in sorted(rows))


def history_digest(history: Sequence[Mapping[str, Any]]) -> str:
    """Of the rows of ``results.csv`` as ``read_history`` gives them back."""
    return digest_of([{key: float(value) for key, value in row.items() if value is not None} for row in history])


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Of a ``config.toml``, as a table: what must stay as the run began. ``env.json`` keeps it."""
    bound = {key: value for key, value in settings.items() if key not in NOT_BOUND}
    bound |= {key: PurePath(bound[key]).name for key in PLACES if key in bound}
    if "method" in bound:  # one from a file is its class: the file may have moved
        bound["method"] = [name.strip().rpartition(":")[2] for name in str(bound["method"]).split(",")]
    return digest_of(bound)


def require_bound(settings: Mapping[str, Any], env: Mapping[str, Any]) -> None:
    """Raises OptionError when ``config.toml`` says other things than when the run began; older runs do not tell."""
    try:
        same = env.get("settings") in (None, settings_digest(settings))
    except TypeError:  # a date: TOML has them, a run does not write them
        same = False
    if not same:
        raise OptionError(
            "config.toml has other settings than when the run began, or is damaged (env.json has their digest)"
        )


def _checked(path: Path, kinds: Mapping[str, Check], parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        found = parse(_read_text(path))
    except RecursionError as error:
        raise OptionError(f"{path.name} cannot be read (it is nested too deeply)") from error
    except ValueError as error:  # not TOML, not JSON, a number of 5,000 digits
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"{path.name} cannot be read ({_reason(error)})") from error
    if not isinstance(found, dict):
        raise OptionError(f"{path.name} does not hold a table")
    for name, check in kinds.items():
        if name in found and not check(found[name]):
            raise OptionError(f"{path.name} has {name} = {str(found[name])[:60]!r}, which is no value of that field")
    if not is_intact(found):
        raise OptionError(f"{path.name} is damaged: it does not match its digest")
    return found


def _read_text(path: Path) -> str:
    if not path.exists():
        raise MissingPathError(f"{path.name} is missing")
    if not path.is_file():  # a pipe would be waited for
        raise OptionError(f"{path.name} is not a file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{path.name} cannot be read (it is not UTF-8)") from error
    except OSError as error:
        raise OptionError(f"{path.name} cannot be read ({error.strerror})") from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
