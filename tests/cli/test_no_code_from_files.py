"""No store, checkpoint, run folder or config names a file that runs: only this command's own words do (docs/security.md)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kdcli import userfile
from kdcli.cli.main import run
from kdcli.engine.caching.plan import plan_store
from kdcli.engine.caching.write import write_store
from kdcli.engine.runtime.progress import NullReporter
from kdcli.methods import resolve
from kdcli.store.manifest import read_manifest, write_manifest
from tests.support.small_runs import CANVAS, cache_options

METHOD = '''
from pathlib import Path

from kdcli.methods.rm import RM

with open({marker!r}, "a") as file:
    file.write("x")


class Mine(RM):
    """Somebody's."""
'''
SMALL = ["--model", "gfl_shufflenet_v2_x0_5", "--canvas", CANVAS, "--epochs", "1", "--batch", "8", "--threads", "1",
         "--workers", "0", "--set", "model.fpn_channels=64", "--set", "model.tower_convs=1"]  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command has a process of its own; these share one."""
    monkeypatch.setattr(resolve, "_users", {})
    monkeypatch.setattr(userfile, "_named", set())


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Is there once the code of ``theirs`` has run."""
    return tmp_path / "marker"


@pytest.fixture
def theirs(tmp_path: Path, marker: Path) -> Path:
    """A file with a method, which says when it runs."""
    file = tmp_path / "theirs.py"
    file.write_text(METHOD.format(marker=str(marker)))
    return file


def of_version(version: int, shapes: Path, teacher: Path, out: Path) -> Path:
    plan = plan_store(cache_options(shapes, teacher, method="rm,ld"), NullReporter())
    write_store(plan.with_schema(replace(plan.schema, version=version)), out, NullReporter())
    return out


def commands(store: Path, shapes: Path, teacher: Path, out: Path) -> list[list[str]]:
    """All that open a store."""
    common = ["--data", shapes, "--teacher", teacher]
    found: list[list[object]] = [
        ["cache", "info", store], ["cache", "verify", store], ["cache", "verify", store, *common, "--rows", "2"],
        ["cache", "show", store, "1", "--out", out / "row.png"], ["cache", "bench", store, "--workers", "0", "--rows", "4"],
        ["cache", "bench", store, "--method", "ld", "--workers", "0", "--rows", "4"],
        ["cache", "add", store, "--method", "pfi"], ["cache", "add", store, "--cache-images"],
        ["cache-teacher", *common, "--method", "rm,ld", "--out", store, "--threads", "1", "--workers", "0"],
        ["cache", "prune", store, "--view", "hflip", "--out", out / "copy"],
        ["cache", "prune", store, "--tensor", "rank@main"],
        ["distill", "--data", shapes, "--cache", store, "--method", "ld", *SMALL, "--out", out / "run"],
        ["cache", "merge", store, store, "--out", out / "merged"],
    ]  # fmt: skip
    return [[str(word) for word in words] for words in found]


@pytest.mark.parametrize(
    ("version", "named"),
    [(1, "path"), (2, "path"), *(pytest.param(v, "beside", marks=pytest.mark.full) for v in (1, 2))],
)
def test_a_store_runs_nothing(
    shapes: Path, teacher: Path, tmp_path: Path, theirs: Path, marker: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], version: int, named: str,
) -> None:  # fmt: skip
    """By an absolute path, and by one in the folder in which the command runs."""
    monkeypatch.chdir(tmp_path)
    store = of_version(version, shapes, teacher, tmp_path / "store")
    manifest = read_manifest(store)
    options = {**manifest.method_options, "mine": {}}
    needs = {} if version == 1 else {**manifest.method_needs, "mine": ("rank@main",)}
    text = f"{theirs if named == 'path' else 'theirs.py'}:Mine"
    write_manifest(store, replace(manifest, methods=("rm", "ld", text), method_options=options, method_needs=needs))
    for command in commands(store, shapes, teacher, tmp_path):
        code = run(command)
        said = capsys.readouterr()
        assert not marker.exists(), command
        assert code in ((4,) if version == 2 else (0, 2, 4)), (command, said.err)
        if code:
            assert said.err.splitlines()[-1].startswith("error: ")
    if version == 1:  # adding reads what all methods of the store read; dropping has to know it
        assert run(["cache", "prune", str(store), "--tensor", "features@all"]) in (2, 3)
        assert run(["--plugin", str(theirs), "cache", "add", str(store), "--method", "pfi"]) in (0, 3)
        assert marker.read_text() == "x"


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert run([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("end", [lambda store: None, lambda store: shutil.rmtree(store)])
def test_a_run_and_a_config_run_nothing(
    shapes: Path, default_store: Path, tmp_path: Path, theirs: Path, marker: Path, capsys: pytest.CaptureFixture[str],
    end: Callable[[Path], None],
) -> None:  # fmt: skip
    """--resume and --config of somebody's; with the file named again they work."""
    store = Path(shutil.copytree(default_store, tmp_path / "store"))
    copy = Path(shutil.copy(theirs, tmp_path / "copy.py"))
    common = ["--data", str(shapes), "--cache", str(store), *SMALL]
    assert run(["distill", *common, "--method", f"{copy}:Mine", "--out", str(tmp_path / "run")]) == 0
    assert marker.read_text() == "x"
    marker.unlink()
    config = tmp_path / "run" / "config.toml"
    text = config.read_text()
    assert f'method = "{copy}:Mine"' in text
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text.replace(str(copy), str(theirs)))
    config.write_text(text.replace(str(copy), str(theirs)))
    end(store)
    for words in (
        ["distill", "--resume", tmp_path / "run"],
        ["distill", "--config", recipe, "--out", tmp_path / "other"],
        ["distill", "--config", recipe, "--data", shapes, "--seeds", "0,1", "--out", tmp_path / "other"],
    ):
        line = refused(capsys, *words)
        assert "kdcli runs no code that a store, a run or a config names" in line
        assert f"kdcli --plugin '{theirs}'" in line
        assert not marker.exists()
    for command in (["compare", tmp_path / "run"], ["eval", tmp_path / "run", "--data", shapes], ["predict", tmp_path / "run",
                    shapes / "val", "--out", tmp_path / "seen"]):  # fmt: skip
        run([str(word) for word in command])
        assert not marker.exists()


def test_what_is_named_again_works(shapes: Path, teacher: Path, tmp_path: Path, theirs: Path, marker: Path) -> None:
    store, student = tmp_path / "store", tmp_path / "run"
    common = ["--data", str(shapes), "--threads", "1", "--workers", "0"]
    write = ["cache-teacher", *common, "--teacher", str(teacher), "--method", f"ld,{theirs}:Mine", "--out", str(store)]
    assert run(write) == 0
    manifest = read_manifest(store)
    assert manifest.methods == ("ld", ":Mine")
    assert set(manifest.method_needs["mine"]) <= {t.need.key for t in manifest.schema.tensors}
    assert str(theirs) not in (store / "zarr.json").read_text()
    assert run(["cache", "verify", str(store), "--teacher", str(teacher), "--data", str(shapes), "--rows", "2"]) == 0
    distill = ["distill", "--data", str(shapes), "--cache", str(store), "--method", f"{theirs}:Mine", *SMALL]
    assert run([*distill, "--out", str(student)]) == 0
    assert (
        run(
            ["--plugin", str(theirs), "distill", "--config", str(student / "config.toml"), "--out", str(tmp_path / "b")]
        )
        == 0
    )
    # dropping a tensor needs no code: the store says what each method reads
    assert run(["cache", "prune", str(store), "--tensor", "box_distribution@main+vlr"]) == 0
    assert read_manifest(store).methods == (":Mine",)
    assert marker.read_text() == "x"  # the file ran once in this process
