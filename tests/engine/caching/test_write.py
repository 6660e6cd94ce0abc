"""Filling a store: in parts, behind the teacher's back, and with errors that come from there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kdcli.cli.main import run
from kdcli.engine.caching.plan import plan_store
from kdcli.engine.caching.write import Part, write_store
from kdcli.engine.loading.samples import Sample
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.runtime.threads import pick_teacher_workers, pick_workers
from kdcli.engine.teacher.forward import TeacherRunner
from kdcli.errors import GateError, StoreError
from kdcli.store.batch_buffers import collate_arrays
from kdcli.store.journal import store_digest
from kdcli.store.locks import lock_store
from kdcli.store.manifest import read_manifest, write_manifest
from kdcli.store.reader import StoreReader
from kdcli.store.schema import StoreSchema, row_tensor
from kdcli.store.writer import StoreWriter
from kdcli.structures import RowKey
from tests.support.files import contents
from tests.support.selection import matrix
from tests.support.small_runs import cache_options


def test_parts_make_the_store_of_one_process(shapes: Path, teacher: Path, default_store: Path, tmp_path: Path) -> None:
    options = cache_options(shapes, teacher)
    out = tmp_path / "parts"
    rows = [write_store(plan_store(options, NullReporter()), out, NullReporter(), Part(k, 3)) for k in (2, 0, 1)]
    assert sum(rows) == 48  # 24 images, two views
    assert min(rows) > 0
    assert contents(out) == contents(default_store)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts"]


def test_parts_go_on_where_others_stopped(shapes: Path, teacher: Path, default_store: Path, tmp_path: Path) -> None:
    options = cache_options(shapes, teacher)
    out = tmp_path / "parts"
    write_store(plan_store(options, NullReporter()), out, NullReporter(), Part(1, 2))
    before = StoreWriter(out, plan_store(options, NullReporter()).schema).done()
    assert before == {1, 3}
    assert (
        write_store(plan_store(options, NullReporter()), out, NullReporter()) == 28
    )  # shards 0 and 2 of 10 rows, the last of 8
    assert contents(out) == contents(default_store)


@pytest.mark.parametrize("workers", matrix([0, 1]))
def test_the_teacher_does_not_wait_for_the_disk(
    shapes: Path, teacher: Path, default_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """The first shard is not written before the teacher has begun the second: with it in between, on a CPU, or beside it."""
    plan = plan_store(cache_options(shapes, teacher, workers=workers), NullReporter())
    assert plan.teacher.interleaved == (workers == 0)
    real_rows, real_write = TeacherRunner.rows, StoreWriter.write_chunks
    rows, went_on, late = [0], threading.Event(), []

    def count_rows(self: TeacherRunner, batch: list[Sample], *rest: Any) -> Any:
        if rows[0] >= plan.schema.shard_rows:
            went_on.set()
        rows[0] += len(batch)
        return real_rows(self, batch, *rest)

    def write(self: StoreWriter, shard: int, *rest: Any) -> int:
        if not went_on.wait(60):
            late.append(shard)
        return real_write(self, shard, *rest)

    monkeypatch.setattr(TeacherRunner, "rows", count_rows)
    monkeypatch.setattr(StoreWriter, "write_chunks", write)
    assert write_store(plan, tmp_path / "store", NullReporter()) == 48
    assert late == []
    assert contents(tmp_path / "store") == contents(default_store)


def test_a_teacher_on_a_cpu_takes_turns_unless_told_otherwise() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pick_teacher_workers(None, cpu) == 0
    assert pick_teacher_workers(3, cpu) == 3
    assert pick_teacher_workers(None, gpu) == pick_workers(None) >= 1
    assert pick_teacher_workers(0, gpu) == 0


def test_a_part_is_refused_while_one_process_writes_all(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    plan = plan_store(cache_options(shapes, teacher, method="rm"), NullReporter())
    out = tmp_path / "store"
    write_store(plan, out, NullReporter(), Part(0, 2))
    with lock_store(out, shared=False), pytest.raises(StoreError, match="written by another process"):
        write_store(plan, out, NullReporter(), Part(1, 2))


def test_an_error_behind_the_teacher_stops_the_run(
    shapes: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = StoreSchema.encode, [0]

    def encode(self: StoreSchema, values: Any, valid: NDArray[np.bool_]) -> Any:
        calls[0] += 1
        if calls[0] == 25:  # of the third shard
            values = {k: np.full_like(v, np.nan) for k, v in values.items()}
        return real(self, values, valid)

    monkeypatch.setattr(StoreSchema, "encode", encode)
    plan = plan_store(cache_options(shapes, teacher, method="rm"), NullReporter())
    with pytest.raises(GateError, match="not finite"):
        write_store(plan, tmp_path / "store", NullReporter())
    done = StoreWriter(tmp_path / "store", plan.schema).done()
    assert done <= {0, 1}
    assert not [f for f in (tmp_path / "store").rglob("*") if f.suffix in (".tmp", ".lock")]
    monkeypatch.undo()
    assert write_store(plan, tmp_path / "store", NullReporter()) == 48 - 10 * len(done)


def test_the_manifest_has_the_error_of_each_tensor(default_store: Path, lossless_store: Path) -> None:
    ours, exact = StoreReader(default_store), StoreReader(lossless_store)
    measured = read_manifest(default_store).errors
    assert measured is not None
    errors = measured.encoding
    assert set(errors) == {t.need.key for t in ours.schema.tensors}
    for tensor in ours.schema.tensors:
        if tensor.need.dense or tensor.need not in exact.schema.tensors:
            continue  # padded cells do not count; what lossless serves from a dense tensor has no rows of its own
        squares, count, worst = 0.0, 0, 0.0
        for image in ours.image_ids:
            for view in ours.views:
                one, other = (row_of(r, image, view)[tensor.need.key].astype(np.float64) for r in (ours, exact))
                squares += float(np.square(one - other).sum())
                count += one.size
                worst = max(worst, float(np.abs(one - other).max(initial=0.0)))
        assert errors[tensor.need.key]["rms"] == pytest.approx(np.sqrt(squares / count), rel=1e-6)
        assert errors[tensor.need.key]["worst"] == pytest.approx(worst, rel=1e-6)
        assert errors[tensor.need.key]["rms"] > 0
    none = read_manifest(lossless_store).errors
    assert none is not None
    assert {e["worst"] for e in none.encoding.values()} == {0.0}


def row_of(reader: StoreReader, image: int, view: str) -> dict[str, Any]:
    row = reader.read(RowKey(image, view))
    needs = tuple(t.need for t in reader.schema.tensors)
    return {
        k: row_tensor(v) for k, v in reader.schema.decode(collate_arrays([row], reader.schema.layout()), needs).items()
    }


def test_errors_come_with_the_last_shard_or_after_a_kill(
    shapes: Path, teacher: Path, default_store: Path, tmp_path: Path
) -> None:
    plan, out = plan_store(cache_options(shapes, teacher), NullReporter()), tmp_path / "store"
    write_store(plan, out, NullReporter(), Part(0, 2))
    assert read_manifest(out).errors is None
    write_store(plan, out, NullReporter(), Part(1, 2))
    assert contents(out) == contents(default_store)
    digest = store_digest(out)
    write_manifest(out, replace(read_manifest(out), errors=None))  # killed before they were written
    assert store_digest(out) == digest
    assert write_store(plan, out, NullReporter()) == 0
    assert contents(out) == contents(default_store)


class Notes(NullReporter):
    """Keeps what the bar says."""

    def __init__(self) -> None:
        self.infos: list[str] = []

    def advance(self, units: int = 1, info: str = "") -> None:
        """Remember."""
        self.infos.append(info)


def test_the_bar_says_how_fast_and_what_waits(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    reporter = Notes()
    write_store(plan_store(cache_options(shapes, teacher), NullReporter()), tmp_path / "store", reporter)
    for word in ("images/s", "MB/s", "smaller than float32", "waiting on the disk"):
        assert word in reporter.infos[-1]


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2"])
def test_a_part_that_is_none(shapes: Path, teacher: Path, capsys: pytest.CaptureFixture[str], shard: str) -> None:
    given = ["--data", str(shapes), "--teacher", str(teacher), "--method", "ld", "--out", "s", f"--shard={shard}"]
    assert run(["cache-teacher", *given]) == 2
    assert "write I/N" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_torchrun_writes_one_store(
    shapes: Path, teacher: Path, default_store: Path, tmp_path: Path, processes: int
) -> None:
    out = tmp_path / "store"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "kdcli",
        "cache-teacher", "--data", str(shapes), "--teacher", str(teacher), "--method", "ld,rm,pfi", "--workers", "0",
        "--shard-rows", "10", "--micro-batch", "4", "--threads", "1", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert read_manifest(out).schema == read_manifest(default_store).schema
    assert contents(out) == contents(default_store)
