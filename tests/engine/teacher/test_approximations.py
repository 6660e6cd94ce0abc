"""What a run says of the approximations in it, from the store to the tables that people read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.teacher.approximations import approximations
from kdcli.engine.training.setup import prepare
from tests.support.small_runs import cache_options, run_request, write


def of_run(shapes: Path, **changes: Any) -> list[str]:
    options = run_request("distill", shapes, **changes).options()
    teacher = prepare(options, frozenset(), NullReporter()).teacher
    assert teacher is not None
    return approximations(teacher, options.teacher_precision)


def test_encodings_of_what_is_read(shapes: Path, default_store: Path, lossless_store: Path) -> None:
    assert of_run(shapes, cache=str(lossless_store), method="ld,rm,pfi") == []
    assert of_run(shapes, cache=str(default_store), method="rm") == ["stored as float16"]
    found = of_run(shapes, cache=str(default_store), method="ld,pfi")
    assert found == ["stored as channel_affine_8, float16, log_odds_8, vector_affine_8"]


def test_methods_by_design_and_a_teacher_in_bf16(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    method = "defeat_thin,drkd_lite,pkd"
    named = ["method defeat_thin", "method drkd_lite"]
    assert of_run(shapes, teacher=str(teacher), method=method) == named
    assert of_run(shapes, teacher=str(teacher), method="pkd", teacher_precision="bf16") == ["teacher in bf16"]
    options = cache_options(shapes, teacher, method=method, precision="bf16", encoding="float16")
    store = write(options, tmp_path / "store")
    assert of_run(shapes, cache=str(store), method=method) == [*named, "teacher in bf16", "stored as float16"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # of a live teacher: a store has its own
def test_a_store_goes_by_its_own_teacher(shapes: Path, lossless_store: Path, precision: str) -> None:
    assert of_run(shapes, cache=str(lossless_store), method="ld", teacher_precision=precision) == []
