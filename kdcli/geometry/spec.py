"""The JSON form of the frozen specifications (grid, assigner, regions) in a store's manifest and in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from kdcli.errors import OptionError, did_you_mean
from kdcli.limits import INT64
from kdcli.shown import shown as shown_value


@dataclass(frozen=True)
class JsonSpec:
    """Base of frozen dataclasses whose fields are numbers, strings, None or tuples of numbers."""

    def to_json(self) -> dict[str, Any]:
        """Every field by its name, tuples as lists, so that it equals itself after a trip through a JSON file."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, complete: bool = False) -> Self:
        """The inverse of ``to_json``. A field that is missing, since an older version wrote ``value``, has its default,
        unless ``value`` must be ``complete``.

        Raises OptionError for a field that is unknown or of another type, and for a missing one without a default.
        """
        if not isinstance(value, Mapping):
            raise OptionError(f"{cls.__name__}: {shown_value(value)} is no table of fields")
        hints = get_type_hints(cls)
        known = {field.name: hints[field.name] for field in fields(cls)}
        for name, given in value.items():
            if name not in known:
                shown = str(name)[:40]
                raise OptionError(f"{cls.__name__}: unknown field '{shown}'{did_you_mean(shown, known)}")
            if not _fits(given, known[name]):
                raise OptionError(f"{cls.__name__}: field '{name}' cannot be {shown_value(given)}")
        for field in fields(cls):
            if field.name in value:
                continue
            if complete or (field.default is MISSING and field.default_factory is MISSING):
                raise OptionError(f"{cls.__name__}: field '{field.name}' is missing; it was written by another version")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a field's type; a whole number is a float too, and no number is infinite."""
    parts, origin = get_args(kind), get_origin(kind)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is tuple:  # of any length
        return isinstance(value, list | tuple) and all(_fits(v, parts[0]) for v in value)
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if kind is float:
        return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < INT64)
    return type(value) is kind and (kind is not int or abs(value) < INT64)
