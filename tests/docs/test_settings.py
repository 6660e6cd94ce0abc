"""The tables of docs/methods/settings*.md: every recipe is in one of them, every cell says something, and what they say of
kdcli in code is what the recipes resolve to."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdcli.detectors.build import parse_model_name
from kdcli.detectors.two_stage.recipes import FASTER_RCNN
from kdcli.methods.resolve import find_methods, resolve_options
from kdcli.options import TrainOptions, build

ROOT = Path(__file__).parents[2]
RECIPES = {f.name: f for f in sorted((ROOT / "examples" / "coco").glob("*.toml"))}
HEADER = ["setting", "official", "ours", "why"]
EVERY = "Every recipe"
WITHOUT = {"CWD, PKD and FGD"}  # sections on what no recipe is for
ASSIGNMENT = re.compile(r"`([a-z_]+(?:\.[a-z_]+)? = [^`]+)`")


@dataclass(frozen=True)
class Section:
    """A table of settings: ``recipes`` that its heading lists, ``rows`` of four cells."""

    title: str
    recipes: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def cells(line: str) -> tuple[str, ...]:
    """The cells of a row of a Markdown table."""
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def sections() -> Iterator[Section]:
    """Every section of the pages that has a table of settings."""
    for page in sorted((ROOT / "docs" / "methods").glob("settings*.md")):
        for part in re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]:
            title, _, body = part.partition("\n")
            listed = re.search(r"^Recipes: (.*?)\n\n", body, re.MULTILINE | re.DOTALL)
            names = re.findall(r"`(\w+\.toml)`", listed[1]) if listed else []
            table = [cells(line) for line in body.splitlines() if line.startswith("|")]
            assert list(table[0]) == HEADER, f"{page.name}: {title}: columns are {', '.join(table[0])}"
            yield Section(title, tuple(RECIPES) if title == EVERY else tuple(names), tuple(table[2:]))


SECTIONS = list(sections())


def settings_of(file: Path) -> dict[str, Any]:
    """What a run of a recipe resolves to: ``epochs``, ``optim.lr``, ``ld.weight``."""
    options = build(TrainOptions, tomllib.loads(file.read_text()))
    detector, _ = parse_model_name(options.model.name)
    found = dict(vars(options))
    for table in ("model", "optim"):
        found |= {f"{table}.{key}": value for key, value in vars(found[table]).items()}
    for name, method in (find_methods(options.method) if options.method else {}).items():
        family = FASTER_RCNN.family if detector.endswith(FASTER_RCNN.family) else detector
        resolved = resolve_options(name, method, family, options.methods.get(name, {}))
        found |= {f"{name}.{key}": value for key, value in resolved.items()}
    return found


def test_every_recipe_is_in_one_table() -> None:
    listed = sorted(name for section in SECTIONS if section.title != EVERY for name in section.recipes)
    assert listed == sorted(RECIPES)
    assert {s.title for s in SECTIONS if not s.recipes} == WITHOUT


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.title)
def test_every_cell_says_something(section: Section) -> None:
    assert section.rows
    for row in section.rows:
        assert len(row) == 4, row
        assert all(row), row
        assert not any(re.search(r"not looked at|todo|\?\?|^[-–—?]$", cell, re.IGNORECASE) for cell in row), row
    assert len({row[0] for row in section.rows}) == len(section.rows)


@pytest.mark.parametrize("section", [s for s in SECTIONS if s.recipes], ids=lambda s: s.title)
def test_values_in_code_are_those_of_the_recipes(section: Section) -> None:
    """Each recipe of the section has one of the values that it gives for an option, and each value has a recipe."""
    resolved = [settings_of(RECIPES[name]) for name in section.recipes]
    given: dict[str, list[Any]] = {}
    for _, _, ours, _ in section.rows:
        for text in ASSIGNMENT.findall(ours):
            key, _, value = text.partition(" = ")
            given.setdefault(key, []).append(tomllib.loads(f"value = {value}")["value"])
    assert given
    for key, values in given.items():
        having = [list(v) if isinstance(v := found[key], tuple) else v for found in resolved if key in found]
        assert [v for v in having if v not in values] == [], f"{section.title}: {key} of a recipe is not in the table"
        assert [v for v in values if v not in having] == [], f"{section.title}: {key} of the table is of no recipe"
