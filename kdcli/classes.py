"""The class list: which categories a detector or a data set knows, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Category:
    """A class: its id in annotation files, and its name."""

    id: int
    name: str


class ClassList(tuple[Category, ...]):
    """Classes in the order 0..K-1: a label is a position in it."""

    __slots__ = ()

    @staticmethod
    def from_json(entries: Iterable[Mapping[str, Any]]) -> ClassList:
        """Inverse of ``to_json``. Raises KeyError, TypeError or ValueError for what is none."""
        return ClassList(Category(int(entry["id"]), str(entry["name"])) for entry in entries)

    @staticmethod
    def numbered(names: Iterable[str]) -> ClassList:
        """Classes with the ids 1, 2, ..."""
        return ClassList(Category(number, name) for number, name in enumerate(names, 1))

    def to_json(self) -> list[dict[str, Any]]:
        """``[{"id": ..., "name": ...}, ...]``, as checkpoints and COCO files have it."""
        return [{"id": category.id, "name": category.name} for category in self]

    @property
    def names(self) -> list[str]:
        """The names, in order."""
        return [category.name for category in self]

    @property
    def ids(self) -> list[int]:
        """The ids in annotation files, in order."""
        return [category.id for category in self]
