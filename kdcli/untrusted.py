"""JSON and TOML of files that may be of anybody: no document that takes the parser, or those who read on, to their limits.

A few kB of brackets are lists within lists, ten thousand deep: Python ends at a thousand, in the parser or in the first
function that walks what it gave.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from typing import Any

from kdcli.limits import INT64, MAX_DEPTH, MAX_JSON, MAX_TOML
from kdcli.shown import cut

# "a.a.a" of TOML is a table in a table; tomllib takes minutes of 100,000 dots, as it does each of them from the start
_KEY = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')"""
DOTTED = re.compile(rf"(?<![\w.-]){_KEY}(?:[ \t]*+\.[ \t]*+{_KEY}){{{2 * MAX_DEPTH}}}")


def parse_json(
    data: str | bytes, *, parse_float: Callable[[str], float] | None = None,
    parse_constant: Callable[[str], float] | None = None,
) -> Any:  # fmt: skip
    """The value of a JSON text.

    Raises ValueError for what is no JSON, nests deeper than ``MAX_DEPTH``, is longer than ``MAX_JSON``, or has a whole
    number that does not fit 64 bits.
    """
    _require_short(data, MAX_JSON)
    try:
        found = json.loads(data, parse_int=_int64, parse_float=parse_float, parse_constant=parse_constant)
    except RecursionError:
        raise _too_deep() from None
    _require_shallow(found)
    return found


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a TOML text. Raises ValueError for what is no TOML, nests deeper than ``MAX_DEPTH`` or is longer than
    ``MAX_TOML``."""
    _require_short(text, MAX_TOML)
    if DOTTED.search(text):
        raise _too_deep()
    try:
        found = tomllib.loads(text)
    except RecursionError:
        raise _too_deep() from None
    _require_shallow(found)
    return found


def _require_short(data: str | bytes, most: int) -> None:
    if len(data) > most:
        raise ValueError(f"{len(data):,} characters are more than any that kdcli reads ({most:,})")


def _require_shallow(value: Any) -> None:
    inside, depth = [value], 0
    while inside:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        lists = [v.values() if isinstance(v, dict) else v for v in inside if isinstance(v, dict | list)]
        inside = [v for values in lists for v in values if isinstance(v, dict | list)]


def _too_deep() -> ValueError:
    return ValueError(f"nested more than {MAX_DEPTH} deep")


def _int64(text: str) -> int:
    if len(text) > 20 or not -INT64 <= (value := int(text)) < INT64:
        raise ValueError(f"the number {cut(text)} does not fit 64 bits")
    return value
