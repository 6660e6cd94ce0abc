"""What ``import kdcli`` offers: these members and no others, documented, and imported only when they are asked for."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import kdcli
from kdcli import errors
from kdcli.api.caching import CacheSettings
from kdcli.api.runs import DistillSettings, RunSettings
from kdcli.options import CacheOptions, TrainOptions

ERRORS = [
    "DataError",
    "GateError",
    "KDError",
    "MissingPathError",
    "NoSpaceError",
    "OptionError",
    "StoreError",
    "UsageError",
    "WorkerError",
]
TYPES = ["Detector", "Losses", "Method", "Need", "Store", "StoreView", "StoredRows", "TeacherBatch"]
FUNCTIONS = ["cache_teacher", "distill", "evaluate", "load_detector", "losses", "open_store", "train"]
HEAVY = {"torch", "torchvision", "numpy", "zarr", "PIL", "matplotlib", "pycocotools", "rich", "typer"}


def test_members() -> None:
    expected = sorted([*ERRORS, *TYPES, *FUNCTIONS, "__version__"])
    assert kdcli.__all__ == expected
    assert dir(kdcli) == expected
    for name in expected:
        assert getattr(kdcli, name) is not None
    with pytest.raises(AttributeError, match="module 'kdcli' has no attribute 'distil'"):
        _ = kdcli.distil  # type: ignore[attr-defined]


def test_every_error_is_there() -> None:
    known = [
        name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, errors.KDError)
    ]
    assert sorted(known) == ERRORS
    assert all(getattr(kdcli, name) is getattr(errors, name) for name in ERRORS)


def modules_after(code: str) -> set[str]:
    """Modules that a fresh Python holds after ``code``."""
    probe = f"import sys; {code}; import json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_is_light() -> None:
    bare = modules_after("pass")
    loaded = modules_after("import kdcli; kdcli.__version__; dir(kdcli); hasattr(kdcli, 'nothing')")
    assert {name for name in loaded - bare if name.startswith("kdcli")} == {"kdcli"}
    assert not HEAVY & loaded
    assert {name for name in modules_after("from kdcli import KDError") if name.startswith("kdcli")} == {
        "kdcli",
        "kdcli.errors",
    }


def test_star_import_gives_the_members() -> None:
    scope: dict[str, Any] = {}
    exec("from kdcli import *", scope)
    assert set(kdcli.__all__) <= set(scope)


@pytest.mark.parametrize("name", [*TYPES, *FUNCTIONS])
def test_documented(name: str) -> None:
    member = getattr(kdcli, name)
    assert len(inspect.getdoc(member) or "") > 40, name
    if name in FUNCTIONS:
        assert "Raises" in str(member.__doc__), name
        hints = get_type_hints(member)
        assert "return" in hints, name
    for method, value in vars(member).items() if name in TYPES else ():
        if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            assert value.__doc__, f"{name}.{method}"


def test_typed() -> None:
    assert (Path(kdcli.__file__).parent / "py.typed").read_text() == ""


@pytest.mark.parametrize(("settings", "options", "apart"), [
    (DistillSettings, TrainOptions, {"command"}),
    (RunSettings, TrainOptions, {"command", *(set(DistillSettings.__annotations__) - set(RunSettings.__annotations__))}),
    (CacheSettings, CacheOptions, {"data", "teacher", "method"}),
])  # fmt: skip
def test_settings_are_the_options_of_the_command(settings: Any, options: Any, apart: set[str]) -> None:
    """Every field, with its type; paths may be Paths, and [model] may be a name."""
    ours, theirs = get_type_hints(settings), get_type_hints(options)
    assert ours.keys() == theirs.keys() - apart
    for name, hint in ours.items():
        if name in ("model", "optim", "method", "methods"):
            continue
        assert re.sub(r" \| pathlib.Path|pathlib.Path \| ", "", str(hint).replace("<class 'str'>", "str")) == str(
            theirs[name]
        ).replace("<class 'str'>", "str"), name
