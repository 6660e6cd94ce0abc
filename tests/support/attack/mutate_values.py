"""Damage to JSON and TOML by its values: other types, absurd numbers, keys twice or not at all, nesting, hostile text."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

import tomli_w

Path_ = tuple[str | int, ...]
HOLE = "kdcli-attack-hole"
DEEP = 20_000

# what is written in the place of a value, as JSON and as TOML text, by the kind of damage
JSON_TEXTS: dict[str, list[str]] = {
    "type": ["null", "true", '""', '"x"', "[]", "{}", "0", "1.5", "[null]", '[[]]', '{"a": 1}', '"1"'],
    "nan": ["NaN", "Infinity", "-Infinity", "1e999"],
    "huge": ["1e308", str(10**30), str(-(10**30)), str(2**63), str(2**31), "1" * 5000],
    "negative": ["-1", "-0.5", str(-(2**63))],
    "text": [
        '"\\u001b]0;owned\\u0007\\u001b[2J"', '"a\\nb"', '"\\u0000"', '"\\ud800"', f'"{"A" * 300_000}"',
            '"../../../../etc/passwd"',
        '"/dev/zero"', '"\\u202ecod.exe"',
    ],
    "deep": ["[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP],
}  # fmt: skip
TOML_TEXTS: dict[str, list[str]] = {
    "type": ["true", '""', '"x"', "[]", "{}", "0", "1.5", "1979-05-27", "[[]]", "{a = 1}", '"1"'],
    "nan": ["nan", "inf", "-inf"],
    "huge": ["1e308", str(10**30), str(2**63), "1_000_000_000_000", "9" * 5000],
    "negative": ["-1", "-0.5", str(-(2**63))],
    "text": ['"\\u001B]0;owned\\u0007\\u001B[2J"', '"a\\nb"', '"\\u0000"', f'"{"A" * 300_000}"', '"/dev/zero"', '"-"'],
    "deep": ["[" * DEEP + "]" * DEEP, "{a=" * 5000 + "1" + "}" * 5000],
}


def paths(document: Any, at: Path_ = ()) -> list[Path_]:
    """The place of every value below ``document``."""
    found = [at] if at else []
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        found += paths(value, (*at, key))
    return found


def draw_path(rng: Random, document: Any) -> Path_:
    """A place, each level as likely as any: lists of a thousand boxes would otherwise hide what stands beside them."""
    at: Path_ = ()
    value = document
    while isinstance(value, (dict, list)) and value and (not at or rng.random() < 0.75):
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        at, value = (*at, key), value[key]
    return at


def with_value(document: Any, at: Path_, value: Any) -> Any:
    """A copy with another value at a place."""
    changed = copy.deepcopy(document)
    if not at:
        return value
    parent = changed
    for key in at[:-1]:
        parent = parent[key]
    parent[at[-1]] = value
    return changed


def without(document: Any, at: Path_) -> Any:
    """A copy without what is at a place."""
    changed = copy.deepcopy(document)
    parent = changed
    for key in at[:-1]:
        parent = parent[key]
    del parent[at[-1]]
    return changed


def damage_json(rng: Random, document: Any) -> tuple[str, str, Path_]:
    """The text of a damaged copy, the kind of the damage and its place."""
    at = draw_path(rng, document)
    kind = rng.choice([*JSON_TEXTS, "missing", "twice", "type"])
    if not at or kind == "missing":
        return (json.dumps(without(document, at)) if at else "[]"), "missing", at
    text = rng.choice(JSON_TEXTS.get(kind, JSON_TEXTS["type"]))
    whole = json.dumps(with_value(document, at, HOLE))
    if kind == "twice":
        if isinstance(at[-1], int):
            return whole.replace(f'"{HOLE}"', f"{text}, {text}"), kind, at
        key = json.dumps(at[-1])
        return whole.replace(f'"{HOLE}"', f"{json.dumps(_at(document, at))}, {key}: {text}"), kind, at
    return whole.replace(f'"{HOLE}"', text), kind, at


def damage_toml(rng: Random, document: dict[str, Any]) -> tuple[str, str, Path_]:
    """Likewise for TOML."""
    at = draw_path(rng, document)
    kind = rng.choice([*TOML_TEXTS, "missing", "twice", "type"])
    if not at or kind == "missing":
        return (tomli_w.dumps(without(document, at)) if at else ""), "missing", at
    text = rng.choice(TOML_TEXTS.get(kind, TOML_TEXTS["type"]))
    whole = tomli_w.dumps(with_value(document, at, HOLE))
    return whole.replace(f'"{HOLE}"', text) + ("\nepochs = 1\nepochs = 2\n" if kind == "twice" else ""), kind, at


def _at(document: Any, at: Path_) -> Any:
    for key in at:
        document = document[key]
    return document


def show(at: Path_) -> str:
    """A place as text."""
    return ".".join(str(key)[:40] for key in at) or "(all)"
