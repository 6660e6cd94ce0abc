"""``compare`` on damaged run folders: the run is left out with a reason, or what it says is what it said."""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from kdcli.digest import sealed
from kdcli.engine.training.run_files import history_digest, read_history, settings_digest
from kdcli.errors import OptionError
from kdcli.report.compare import compare
from kdcli.report.runs import load_run
from tests.support.damage import BROKEN, NESTED, as_json, flips, other_values

MakeRun = Callable[..., Path]
# of config.toml, none of which is an experiment's setting
FREE = {"data", "out", "workers", "threads", "teacher", "cache"}


@pytest.fixture
def student(make_run: MakeRun) -> Path:
    """A finished run with all its digests."""
    folder = make_run("student", ap=43.0, method=["ld"], tables={"optim": {"lr": 0.1}})
    settings = tomllib.loads((folder / "config.toml").read_text())
    env = sealed(json.loads((folder / "env.json").read_text()) | {"settings": settings_digest(settings)})
    (folder / "env.json").write_text(json.dumps(env))
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics |= {
        "results": history_digest(read_history(folder)),
        "approximations": ["x"],
        "weights_sha256": {"last": "0"},
    }
    (folder / "metrics.json").write_text(json.dumps(sealed(metrics)))
    assert load_run(folder).problem is None
    return folder


def shown(*folders: Path) -> dict[str, Any]:
    """What ``compare`` says, without the places of things."""
    found = compare([load_run(folder) for folder in folders]).to_json()
    found["settings_diff"] = {k: v for k, v in found["settings_diff"].items() if k not in FREE}
    return found


@pytest.mark.parametrize("share", [0.05, pytest.param(1.0, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ["config.toml", "env.json", "metrics.json", "results.csv"])
def test_damage_is_left_out_or_changes_nothing(make_run: MakeRun, student: Path, name: str, share: float) -> None:
    base = make_run("base", ap=40.0)
    whole = shown(base, student)
    curve = load_run(student).history
    data = (student / name).read_bytes()
    draw = random.Random(3)
    cases = [*BROKEN, *NESTED, *flips(data, 100, draw)]
    if name != "results.csv":
        table = tomllib.loads(data.decode()) if name == "config.toml" else json.loads(data)
        for changed in other_values(table):
            if draw.random() < share:
                try:
                    cases.append(tomli_w.dumps(changed).encode() if name == "config.toml" else as_json(changed))
                except (TypeError, ValueError):
                    continue  # TOML has no null and no lone surrogate
    left_out = 0
    for case in cases:
        (student / name).write_bytes(case)
        run = load_run(student)
        if run.problem is not None:
            assert name in run.problem or run.problem == "metrics.json and env.json are not of one run"
            assert "\n" not in run.problem
            left_out += 1
        else:
            assert shown(base, student) == whole
            assert run.history == curve
    assert left_out > 0.6 * len(cases)


@pytest.mark.parametrize("name", ["config.toml", "env.json", "metrics.json"])
def test_values_of_another_kind_in_a_run_without_digests(make_run: MakeRun, name: str) -> None:
    """Of an earlier kdcli, or written by hand: every value that is read has its kind."""
    base, old = make_run("base", ap=40.0), make_run("old", ap=43.0, method=["ld"])
    data = (old / name).read_bytes()
    table = tomllib.loads(data.decode()) if name == "config.toml" else json.loads(data)
    tried = 0
    for changed in other_values(table):
        try:
            (old / name).write_bytes(tomli_w.dumps(changed).encode() if name == "config.toml" else as_json(changed))
        except (TypeError, ValueError):
            continue
        tried += 1
        try:
            comparison = compare([load_run(base), load_run(old)])
        except OptionError as error:  # of another data set
            problem = str(error)
        else:
            problem = json.dumps(comparison.to_json())
        assert "\n" not in problem
    assert tried > 100


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("metrics.json", "ap", "43"),
        ("metrics.json", "ap", [43]),
        ("metrics.json", "ap", True),
        ("metrics.json", "ap", 430.0),
        ("metrics.json", "per_class", [1]),
        ("metrics.json", "per_class", {"cat": "x"}),
        ("metrics.json", "approximations", "x"),
        ("metrics.json", "wall_s", "soon"),
        ("metrics.json", "epochs", 1.5),
        ("env.json", "versions", "2.14"),
        ("env.json", "data_sha256", 7),
        ("config.toml", "seed", "0"),
        ("config.toml", "epochs", [4]),
        ("config.toml", "method", 3),
        ("config.toml", "model", {"name": 1}),
        ("config.toml", "command", "predict"),
    ],
)
def test_the_reason_names_file_and_field(make_run: MakeRun, name: str, field: str, value: object) -> None:
    folder = make_run("a")
    text = (folder / name).read_text()
    table = tomllib.loads(text) if name == "config.toml" else json.loads(text)
    table[field] = value
    (folder / name).write_bytes(tomli_w.dumps(table).encode() if name == "config.toml" else as_json(table))
    problem = load_run(folder).problem
    assert problem is not None
    assert f"{name} has {field} = " in problem
