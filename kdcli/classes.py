"""The class list: which categories a detector or a data set knows, and in which order.

Classes are matched by name, between a teacher and a data set, and by id in annotation files: both must be unique.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
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
        """Inverse of ``to_json``. Raises KeyError, TypeError or ValueError for what is none.

        ValueError too, naming the classes, when two of them share an id or a name.
        """
        return ClassList(Category(int(entry["id"]), str(entry["name"])) for entry in entries).require_unique()

    @staticmethod
    def numbered(names: Iterable[str]) -> ClassList:
        """Classes with the ids 1, 2, ..."""
        return ClassList(Category(number, name) for number, name in enumerate(names, 1))

    def to_json(self) -> list[dict[str, Any]]:
        """``[{"id": ..., "name": ...}, ...]``, as checkpoints and COCO files have it."""
        return [{"id": category.id, "name": category.name} for category in self]

    def require_unique(self) -> ClassList:
        """The list itself. Raises ValueError, in one line, when two classes have one id or one name."""
        for name, twins in self.by_name().items():
            if len(twins) > 1:
                raise ValueError(f"{len(twins)} classes have the name {name!r} (ids {_and(c.id for c in twins)})")
        names: dict[int, str] = {}
        for category in self:
            if category.id in names:
                raise ValueError(f"{names[category.id]!r} and {category.name!r} have the same id {category.id}")
            names[category.id] = category.name
        return self

    def by_name(self) -> dict[str, list[Category]]:
        """The classes that have a name, for each name."""
        return _grouped(self, lambda category: category.name)

    def look_alikes(self) -> list[list[Category]]:
        """Classes whose names are the same but for case, blanks or the Unicode form: groups of two or more."""
        return [group for group in _grouped(self, lambda c: folded(c.name)).values() if len(group) > 1]

    @property
    def names(self) -> list[str]:
        """The names, in order."""
        return [category.name for category in self]

    @property
    def ids(self) -> list[int]:
        """The ids in annotation files, in order."""
        return [category.id for category in self]


def folded(name: str) -> str:
    """A name without what people do not see or do not mean: case, blanks around and doubled, the Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def look_alike(name: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that differs from ``name`` by case, blanks or Unicode form alone; None if there is none."""
    return next((other for other in known if other != name and folded(other) == folded(name)), None)


def _grouped(classes: ClassList, key: Callable[[Category], str]) -> dict[str, list[Category]]:
    groups: dict[str, list[Category]] = defaultdict(list)
    for category in classes:
        groups[key(category)].append(category)
    return groups


def _and(ids: Iterable[int]) -> str:
    return " and ".join(map(str, ids))
