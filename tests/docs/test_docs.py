"""What the documentation says exists: commands and flags, links, options with their defaults, the reading snippet."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import typer

from kdcli.cli import main as command_line
from kdcli.cli.main import app
from kdcli.detectors.base import BoxBranch, ModelSpec
from kdcli.detectors.build import build_detector
from kdcli.detectors.dense.recipes import GFL
from kdcli.methods import METHODS
from kdcli.methods.base import method_options
from kdcli.options import ModelOptions, OptimOptions, TrainOptions
from kdcli.store.batch_buffers import collate_arrays
from kdcli.store.encoding_error import Measured
from kdcli.store.encoding_policy import plan_tensors
from kdcli.store.row_identity import pack_identity
from kdcli.store.schema import StoreSchema
from kdcli.store.writer import StoreWriter, create_store
from kdcli.structures import Canvas, RowKey
from kdcli.tensors import DERIVED, Need, TensorSpec
from tests.support.store_case import make_manifest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BUILT_IN = ("gfl", "retinanet", "atss", "fcos", "faster_rcnn")
COMMAND_TABLES = {"model": ModelOptions, "optim": OptimOptions, "train": TrainOptions}

assert command_line.COMMANDS  # registers the commands on ``app``
CLI: Any = typer.main.get_command(app)


def command_lines() -> list[Any]:
    """Every ``kdcli ...`` of fenced shell blocks and of inline code, as (page, words)."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = [
            x for lang, body in FENCE.findall(text) if lang == "sh" for x in body.replace("\\\n", " ").splitlines()
        ]
        prose = FENCE.sub("", text)
        lines += re.findall(r"`(kdcli [^`]*)`", prose.replace("\n", " "))
        for line in lines:
            if line.startswith("torchrun "):
                line = line.partition(" -m ")[2]
            if line.startswith("kdcli ") and "..." not in line and "COMMAND" not in line:
                words = shlex.split(line, comments=True)[1:]
                found.append(pytest.param(words, id=f"{page.relative_to(ROOT)}: {line}"))
    return found


def leaf(words: list[str]) -> tuple[Any, list[str]]:
    """The command that ``words`` name, and its arguments."""
    command, rest = CLI, list(words)
    while rest[:1] == ["--plugin"]:  # of kdcli itself, before the command
        rest = rest[2:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"no command {rest[0]}"
        command = command.commands[rest.pop(0)]
    return command, rest


def leaves(group: Any = CLI, path: str = "kdcli") -> Iterator[tuple[str, Any]]:
    """Every command with its full name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def flags(command: Any) -> set[str]:
    """Long flags of a command."""
    return {o for p in command.params for o in p.opts if o.startswith("--")} | {"--help", "--debug"}


@pytest.mark.parametrize("words", command_lines())
def test_command_exists(words: list[str]) -> None:
    command, rest = leaf(words)
    named = {w.split("=")[0] for w in rest if w.startswith("--")}
    assert named <= flags(command), f"unknown: {named - flags(command)}"
    arguments = [w for w in rest if w != "--debug"]
    if arguments and "--help" not in arguments:  # a bare `kdcli eval` in prose only names the command
        command.make_context("kdcli", arguments)  # values have the right types, nothing required is missing


@pytest.mark.parametrize(("name", "command"), list(leaves()), ids=lambda v: v if isinstance(v, str) else "")
def test_every_command_is_documented_with_an_example(name: str, command: Any) -> None:
    section = (ROOT / "docs" / "cli.md").read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert f"```sh\n{name}" in section
    assert f"Example: {name}" in command.help, "the help has no example"


def test_prose_names_real_flags() -> None:
    known = set().union(*(flags(command) for _, command in leaves())) | flags(CLI) | {"--check"}  # ruff's
    for page in PAGES:
        named = set(re.findall(r"`(--[a-z][a-z-]*)", page.read_text()))
        assert named <= known, f"{page.name}: {named - known}"


def test_set_tables_exist() -> None:
    tables = {name: {f.name for f in fields(cls)} for name, cls in COMMAND_TABLES.items()}
    tables["model"] |= {"neck"}  # of a conversion: no run has it
    tables |= {name: set(method_options(method)) for name, method in METHODS.items()}
    pattern = re.compile(rf"\b({'|'.join(tables)})\.(\w+)(?==|`)")
    for page in PAGES:
        for table, key in pattern.findall(page.read_text()):
            if key not in ("csv", "json", "pt", "md", "py"):
                assert key in tables[table], f"{page.name}: {table}.{key}"


@pytest.mark.parametrize("method", METHODS)
def test_option_tables_of_methods_are_complete(method: str) -> None:
    written = _option_rows(sorted((ROOT / "docs" / "methods").glob("*.md")), method)
    assert written == {name: _shown(p.default) for name, p in method_options(METHODS[method]).items()}


@pytest.mark.parametrize("table", ["model", "optim"])
def test_option_tables_of_training_are_complete(table: str) -> None:
    written = _option_rows([ROOT / "docs" / "training.md"], table)
    expected = {f.name: _shown(f.default) for f in fields(COMMAND_TABLES[table])}
    if table == "model":
        expected.pop("name")  # it is --model
    assert written == expected


def test_methods_table_of_concepts() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text()
    for name, method in METHODS.items():
        line = next(x for x in text.splitlines() if x.startswith(f"| `{name}` |"))
        assert set(re.findall(r"`(\w+@[\w+]+)`", line)) == {need.key for need in method.needs}


def test_matrix_of_methods() -> None:
    text = (ROOT / "docs" / "methods" / "README.md").read_text()
    marks = {}
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if len(cells) == 7 and cells[0].startswith("`"):
            marks |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), cells[1:6])
    specs = {
        (d, box): set(build_detector(ModelSpec(d, "shufflenet_v2_x0_5", 2, 32, 1, head_channels=32, box=box)).specs())
        for d in BUILT_IN
        for box in get_args(BoxBranch)
        if (d, box) != ("faster_rcnn", "distribution")
    }
    for name, method in METHODS.items():
        wanted = {DERIVED.get(need.name, need.name) for need in method.needs}
        expected = [
            "yes"
            if wanted <= specs[d, "default"]
            else "dist"
            if wanted <= specs.get((d, "distribution"), set())
            else "-"
            for d in BUILT_IN
        ]
        assert marks[name] == expected, name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    prose = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_pages_are_reachable_and_portable() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s:]+)\)", page.read_text())
    }
    assert [p for p in PAGES if p not in linked and p.name != "README.md"] == []
    for page in PAGES:
        text = page.read_text()
        assert "/work/" not in text, page
        assert "/home/" not in text, page


def test_reading_snippet_of_the_store_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = [b for lang, b in FENCE.findall((ROOT / "docs" / "store-format.md").read_text()) if lang == "python"]
    values = _small_store(tmp_path / "STORE")
    scope: dict[str, Any] = {}
    exec(snippet.replace('"STORE"', repr(str(tmp_path / "STORE"))), scope)
    assert capsys.readouterr().out == "5 entries, 3 positives (5, 4, 17)\n"
    span = values.max(axis=-1, keepdims=True) - values.min(axis=-1, keepdims=True)
    assert (np.abs(scope["edges"] - values) <= 0.55 * span / 255 + 0.01).all()
    assert scope["anchor"].tolist() == [2, 3, 5, 7, 11]


def _small_store(path: Path) -> np.ndarray[Any, Any]:
    """Image 1 in two views; returns the edge logits [5, 4, 17] of the second."""
    needs = (Need("box_distribution", "main+vlr"), Need("cls_logits", "main"))
    specs = {"box_distribution": TensorSpec("anchor", (4, 17)), "cls_logits": TensorSpec("anchor", (3,))}
    schema = StoreSchema(grid=GFL.grid, canvas=Canvas(64, 64), rows=2, shard_rows=2, tensors=plan_tensors(needs, specs))
    create_store(path, make_manifest(schema), np.array([1]))
    rng = np.random.default_rng(0)
    rows, edges = [], np.zeros(0, np.float32)
    for view, count, flag in (("identity", 1, [1]), ("hflip", 5, [1, 2, 3, 2, 1])):
        edges = rng.normal(size=(count, 4, 17)).astype(np.float32)
        positives = sum(f & 1 for f in flag)
        row: dict[str, Any] = {
            "row/identity": pack_identity(bytes(32), bytes(16), RowKey(1, view), schema.version),
            "row/geometry": np.zeros(11),
            "entries/count": np.array([count], np.int32),
            "entries/index": np.array([2, 3, 5, 7, 11][:count], np.int32),
            "entries/flag": np.array(flag, np.uint8),
            "entries/gt": np.zeros(count, np.int16),
            "entries/weight": np.zeros(count, np.float32),
        }
        teacher = {needs[0].key: edges, needs[1].key: np.zeros((positives, 3), np.float32)}
        rows.append(row | schema.encode(teacher, np.ones(schema.grid.num_cells(schema.canvas), bool)))
    StoreWriter(path, schema).write_shard(0, rows, Measured())
    assert collate_arrays([rows[1]], schema.layout())["entries/index"].shape == (5,)
    return edges


def _option_rows(pages: list[Path], table: str) -> dict[str, str]:
    """``| `table.option` | default |`` rows of ``pages``."""
    text = "\n".join(page.read_text() for page in pages)
    return dict(re.findall(rf"^\| `{table}\.(\w+)` \| ([^|]*?) \|", text, re.MULTILINE))


def _shown(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
