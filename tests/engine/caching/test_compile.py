"""``--compile``: the same store, a manifest that says so, and one clear line where it cannot work.

The eager backend stands in for the real one, which takes a C++ compiler and minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.cli.main import run
from kdcli.engine.caching.plan import plan_store
from kdcli.engine.caching.write import Part, write_store
from kdcli.engine.runtime.progress import NullReporter
from kdcli.errors import StoreError
from kdcli.store.manifest import read_manifest, write_manifest
from tests.support.files import contents
from tests.support.small_runs import cache_options, make_teacher

REAL = torch.compile


def use(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    def compile_with(model: Any, **options: Any) -> Any:
        return REAL(model, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compile_with)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """PyTorch keeps what it compiled."""
    yield
    torch._dynamo.reset()


@pytest.mark.full
def test_a_compiled_teacher_writes_the_same_rows(
    shapes: Path, teacher: Path, default_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "eager")
    options = cache_options(shapes, teacher, compile=True)
    plan, out = plan_store(options, NullReporter()), tmp_path / "store"
    assert plan.teacher.forward.network is not None
    write_store(plan, out, NullReporter(), Part(0, 2))
    with pytest.raises(StoreError, match=r"teacher_run.compile: store True, here None"):
        write_store(plan_store(cache_options(shapes, teacher), NullReporter()), out, NullReporter())
    write_store(plan, out, NullReporter())
    ours, plain = contents(out), contents(default_store)
    assert read_manifest(out).teacher_run.compile is True
    differ = {
        k for k in plain if ours[k] != plain[k]
    }  # the same backend gives the same bits; the journal names the store
    assert differ == {"zarr.json", *(k for k in plain if k.startswith("journal/"))}


def test_a_store_from_before_goes_on(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    plan, out = plan_store(cache_options(shapes, teacher, method="rm"), NullReporter()), tmp_path / "store"
    write_store(plan.with_schema(replace(plan.schema, version=1)), out, NullReporter(), Part(0, 2))
    manifest = read_manifest(out)
    older = replace(manifest, teacher_run=replace(manifest.teacher_run, records_compile=False))
    assert "compile" not in older.to_json()["teacher_run"]
    write_manifest(out, older)
    assert read_manifest(out) == older
    assert write_store(plan, out, NullReporter()) == 20


def test_without_a_compiler(
    shapes: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    use(monkeypatch, broken)
    command = ["cache-teacher", "--data", shapes, "--teacher", teacher, "--method", "rm", "--threads", 1, "--compile"]
    assert run([*map(str, command), "--out", str(tmp_path / "store")]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: --compile: PyTorch cannot compile the teacher here (")
    assert "No working C++ compiler found" in lines[0]
    assert lines[0].endswith("install a C++ compiler such as g++, or leave out --compile")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["gfl", "retinanet", "atss", "fcos", "fcos+distribution", "faster_rcnn"])
def test_every_detector_compiles_whole(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, detector: str
) -> None:
    """A break in the graph would be run by Python, silently, and is refused."""
    use(monkeypatch, "eager")
    checkpoint = make_teacher(tmp_path / "teacher.pt", detector=detector, scale=5.0)
    plan = plan_store(cache_options(shapes, checkpoint, method="cwd", compile=True), NullReporter())
    assert plan.teacher.forward.network is not None
