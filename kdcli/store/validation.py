"""What JSON has to look like before anything goes by it: anyone can put a right checksum on a hostile document.

Each function raises ValueError, naming the field as ``impossible ...``; who reads the document says where it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, TypeVar

from kdcli.store.encodings import Box16, ChannelAffine
from kdcli.store.schema import StoreSchema
from kdcli.tensors import Need, Per, Region, per_level

T = TypeVar("T")
DENSE_PER = (Per.CELL, Per.ANCHOR, *(per_level(k) for k in range(5)))


def require(right: bool, what: str) -> None:
    """Raises ValueError when ``what`` is not ``right``."""
    if not right:
        raise ValueError(f"impossible {what}")


def table(value: Any, what: str) -> dict[str, Any]:
    """``value``, which has to be a table."""
    require(isinstance(value, dict), what)
    found: dict[str, Any] = value
    return found


def check_keys(value: Any, what: str, needed: Collection[str], optional: Collection[str] = ()) -> None:
    """``value`` is a table with all of the ``needed`` fields, and no other but ``optional`` ones."""
    names = table(value, what).keys()
    for name in needed:
        require(name in names, f"{what}: no {name}")
    unknown = sorted(str(name)[:40] for name in names - {*needed, *optional})
    if unknown:
        raise ValueError(f"impossible {what}: unknown field {unknown[0]!r}, of a newer kdcli")


def field(document: dict[str, Any], name: str, kind: type[T]) -> T:
    """The field ``name``, which has to be of one kind."""
    value = document.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"impossible or no {name}")
    return value


def is_count(value: Any) -> bool:
    """Whether it is a whole number that may count something."""
    return type(value) is int and 0 <= value < 2**62


def whole_numbers(document: dict[str, Any], name: str) -> tuple[int, ...]:
    """A list of whole numbers."""
    values = field(document, name, list)
    require(all(type(v) is int for v in values), name)
    return tuple(values)


def check_numbers(found: Any) -> dict[str, dict[str, float]]:
    """By tensor, then by name, finite numbers of at least 0; what was measured has a count."""
    for numbers in table(found, "errors").values():
        for number in table(numbers, "errors").values():
            require(type(number) in (int, float) and math.isfinite(number) and number >= 0, "errors")
        require(numbers.get("count", 1) > 0, "errors")
    checked: dict[str, dict[str, float]] = found
    return checked


def check_readable(schema: StoreSchema) -> None:
    """Raises ValueError for a finished store's schema by which its arrays could be read, but not decoded."""
    stored = {t.need for t in schema.tensors}
    for need in schema.derived_from_dense:
        require(Need(need.name, Region.ALL) in stored, f"{need.key}, which no dense tensor serves")
    for tensor in schema.tensors:
        need = tensor.need
        kinds: dict[str, tuple[str, ...]] = {
            Region.ALL: DENSE_PER,
            Region.GT: (Per.BOX,),
            Region.PROPOSALS: (Per.PROPOSAL,),
        }
        kind = kinds.get(need.region, (Per.CELL, Per.ANCHOR))
        require(tensor.per in kind, f"{need.key} per {tensor.per}")
        # these have a scale for each level, and sparse rows have no levels
        by_level = isinstance(tensor.encoding, ChannelAffine | Box16)
        require(need.dense or not by_level, f"{need.key} as {tensor.encoding.to_json()['name']}")
