"""The JSON form of the frozen specifications (grid, assigner, regions) in a store's manifest and in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

from kdcli.errors import OptionError, nearest


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

        Raises OptionError for a field that is unknown, and for a missing one without a default.
        """
        known = [f.name for f in fields(cls)]
        for name in value:
            if name not in known:
                raise OptionError(f"{cls.__name__}: unknown field '{name}'{nearest(name, known)}")
        for field in fields(cls):
            if field.name in value:
                continue
            if complete or (field.default is MISSING and field.default_factory is MISSING):
                raise OptionError(f"{cls.__name__}: field '{field.name}' is missing; it was written by another version")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
