"""Every option and every ``--set`` key with values that nobody can mean: refused in one line, before anything is made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from kdcli.detectors.base import ModelSpec
from kdcli.engine.training.run_config import from_flags
from kdcli.errors import KDError
from kdcli.methods import METHODS
from kdcli.methods.resolve import resolve_options
from kdcli.options import TrainOptions, parse_assignments
from kdcli.shown import one_line
from kdcli.store.journal import store_digest
from tests.support.absurd import (
    COMMANDS,
    LONGEST,
    VALUES,
    attempt,
    command_line,
    commands,
    options,
    set_keys,
    stop_before_writing,
)

ABSURD = [
    ("--epochs", "1000000000000"), ("--batch", "1000000000"), ("--workers", "1000"), ("--threads", "1000000000000"),
    ("--canvas", "999968"), ("--canvas", "32x999968"), ("--views", "crop-1000000000"), ("--views", "crop-" + "9" * 5000),
    ("--seed", "9" * 30), ("--seed", "-1"), ("--seeds", "9" * 30), ("--seeds", ",".join(map(str, range(100_000)))),
    ("--gradient-limit", "nan"), ("--set", "train.micro_batch=1000000000"), ("--set", "optim.lr=" + "[" * 20_000),
    ("--set", "model.fpn_channels=1000000000"), ("--set", "ld.weight=nan"), ("--set", "ld.vlr=-1"),
    ("--set", "ld.temperature=1e-320"), ("--set", "train.command=train"), ("--out", ""), ("--out=", "x"),
]  # fmt: skip
FEW = ("1000000000000", "nan", "-1e300", "0x" + "f" * 5000)
MANY = (*VALUES, "[[1]]", "[9999999999999999999999]", "1979-05-27", "{a=1}", "true")


def _read(key: str, value: str) -> None:
    """What ``distill --set KEY=VALUE`` reads of it before it opens anything."""
    name, _, option = key.partition(".")
    method = name if name in METHODS else "ld"
    fields: dict[str, Any] = {"data": "d", "method": method, "cache": "s"}
    asked = from_flags("distill", fields, {}, "gfl_resnet18", parse_assignments([f"{key}={value}"])).options()
    assert isinstance(asked, TrainOptions)
    resolve_options(method, METHODS[method], "gfl", asked.methods.get(method, {}))
    if name == "model" and option != "name":
        ModelSpec("fcos", "resnet18", 3, **{option: getattr(asked.model, option)})


@pytest.mark.parametrize("values", [FEW, pytest.param(MANY, marks=pytest.mark.full)], ids=["few", "many"])
def test_every_set_key(values: tuple[str, ...]) -> None:
    refused = []
    keys = set_keys()
    assert {"optim.lr", "train.threads", "model.reg_max", "ld.temperature", "pkd.levels"} <= set(keys)
    for key in keys:
        for value in values:
            try:
                _read(key, value)
            except KDError as error:
                refused.append(one_line(str(error)))
    assert len(refused) > 0.5 * len(keys) * len(values)
    assert max(map(len, refused)) <= LONGEST


@pytest.mark.parametrize(("flag", "value"), ABSURD, ids=[f"{f} {v[:24]}" for f, v in ABSURD])
def test_absurd_values_are_refused_before_anything_is_made(
    shapes: Path, teacher: Path, default_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, value: str
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    stop_before_writing(monkeypatch)
    line = command_line("distill", shapes, teacher, default_store, tmp_path / "out")
    outcome = attempt([*line, flag, value], [tmp_path / "out"])
    assert outcome.fault == ""
    assert outcome.code in (2, 3), outcome
    assert list(tmp_path.iterdir()) == []


def test_the_commands_are_all_here() -> None:
    assert {" ".join(path) for path, _ in commands()} == set(COMMANDS)


def _attack(command: str, each: int, data: Path, teacher: Path, store: Path, folder: Path) -> None:
    """``each``: the n-th of the values, turned from option to option, so that all are met."""
    known = {" ".join(path): found for path, found in commands()}[command]
    right = command_line(command, data, teacher, store, folder / "out")
    lines = [
        [*right, flag, value] for i, flag in enumerate(options(known)) for value in (VALUES * 2)[i % 7 :: each][:27]
    ]
    for k in range(sum(p.param_type_name == "argument" for p in known.params)):
        place = len(command.split()) + k
        lines += [[*right[:place], value, *right[place + 1 :]] for value in VALUES[::each]]
    before = store_digest(store)
    for line in lines:
        outcome = attempt(line, [folder / "out", folder / "out.png"])
        assert outcome.fault == "", outcome
        for made in folder.iterdir():
            shutil.rmtree(made) if made.is_dir() else made.unlink()
    assert store_digest(store) == before


@pytest.mark.full
@pytest.mark.parametrize("command", COMMANDS)
def test_some_values_of_every_option(
    shapes: Path, teacher: Path, default_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    stop_before_writing(monkeypatch)
    _attack(command, 13, shapes, teacher, default_store, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_value_of_every_option(
    shapes: Path, teacher: Path, default_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    stop_before_writing(monkeypatch)
    _attack(command, 1, shapes, teacher, default_store, tmp_path)
