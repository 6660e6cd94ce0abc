"""The price of a store: counted entries, bytes against the store that is written, the model of the time, and break-even."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcli.cli.main import run
from kdcli.engine.caching.estimate import count as count_module
from kdcli.engine.caching.estimate.count import count_micro_batches, count_units, mean_at, scattered, units_of
from kdcli.engine.caching.estimate.estimate import Estimate, Workload, break_even, estimate, run_seconds, stage_seconds
from kdcli.engine.caching.estimate.probe import StageTimings
from kdcli.engine.caching.plan import StorePlan, plan_store
from kdcli.engine.caching.write import Part, write_store
from kdcli.engine.runtime.progress import NullReporter
from kdcli.store.journal import read_journal
from kdcli.store.storage.object_store import ObjectStorage
from tests.support.selection import matrix
from tests.support.small_runs import cache_options

STAGES = {"teacher", "loading", "encoding", "disk", "cores"}


def plan_of(data: Path, teacher: Path, method: str, **changes: Any) -> StorePlan:
    return plan_store(cache_options(data, teacher, method=method, **changes), NullReporter())


def written_bytes(store: Path) -> dict[str, int]:
    """Bytes of each array of a store that is there."""
    found: dict[str, int] = {}
    for entry in read_journal(store).values():
        for path, file in entry.files.items():
            found[path] = found.get(path, 0) + file.size
    return found


def agree(found: Estimate, store: Path) -> None:
    """The estimate is within 10 % of the store: in all, and for each array that is 1 % of it or more."""
    real = written_bytes(store)
    assert set(found.bytes_by_array) == set(real)
    assert found.bytes_total == pytest.approx(sum(real.values()), rel=0.1)
    for path, size in real.items():
        if size > 0.01 * sum(real.values()):
            assert found.bytes_by_array[path] == pytest.approx(size, rel=0.1), path


@pytest.fixture(scope="session")
def uneven(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred boxes on every third image, none on the others."""
    root = tmp_path_factory.mktemp("uneven") / "data"
    shutil.copytree(shapes, root)
    file = root / "annotations" / "train.json"
    document = json.loads(file.read_text())
    draw = np.random.default_rng(5)
    document["annotations"] = []
    for image in sorted(document["images"], key=lambda i: i["id"])[2::3]:
        for k in range(100):
            w, h = (float(v) for v in draw.uniform(10, 40, 2))
            x, y = float(draw.uniform(0, image["width"] - w)), float(draw.uniform(0, image["height"] - h))
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1, "image_id": image["id"], "category_id": 1 + k % 8,
                    "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
                }
            )  # fmt: skip
    file.write_text(json.dumps(document))
    return root


@pytest.mark.parametrize(
    ("method", "changes"),
    matrix(
        [
            ("ld", {}),
            ("pfi", {}),
            ("ld,rm,pfi", {"views": "identity,crop-2"}),
            ("rm", {"cache_images": True}),
            ("ld,pfi", {"encoding": "lossless"}),
        ]
    ),
)
def test_bytes_are_those_of_the_store(
    shapes: Path, teacher: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    plan = plan_of(shapes, teacher, method, **changes)
    found = estimate(plan, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []
    assert found.disk_timed
    assert found.counted_rows == found.rows == plan.schema.rows
    assert sum(found.bytes_by_tensor.values()) == found.bytes_total == sum(found.bytes_by_array.values())
    stored = (
        {t.need.key for t in plan.schema.tensors} | {"index"} | ({"images"} if "cache_images" in changes else set())
    )
    assert set(found.bytes_by_tensor) == stored
    write_store(plan, tmp_path / "store", NullReporter())
    agree(found, tmp_path / "store")


def test_uneven_images(uneven: Path, teacher: Path, tmp_path: Path) -> None:
    plan = plan_of(uneven, teacher, "ld")
    found = estimate(plan, tmp_path / "store")
    write_store(plan, tmp_path / "store", NullReporter())
    agree(found, tmp_path / "store")
    counts = [units_of(plan, plan.item(r))["entries/index"] for r in range(48)]
    assert sum(counts[:: 48 // 16][:16]) == 0  # 16 evenly spaced rows would have seen no entry at all
    assert max(counts) > 200


def test_some_rows_stand_for_all(uneven: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(uneven, teacher, "ld,rm")
    whole = count_units(plan)
    assert whole.totals == {path: pytest.approx(float(values.sum())) for path, values in whole.units.items()}
    monkeypatch.setattr(count_module, "COUNT_ROWS", 20)
    some = count_units(plan)
    assert len(some.items) == 20
    for path, total in whole.totals.items():
        assert some.totals[path] == pytest.approx(total, rel=0.1), path
    naive = 48 * float(some.units["entries/index"].mean())
    assert abs(naive - whole.totals["entries/index"]) > abs(
        some.totals["entries/index"] - whole.totals["entries/index"]
    )


def test_slow_counting_stops(shapes: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(shapes, teacher, "ld")
    monkeypatch.setattr(count_module, "COUNT_SECONDS", 0.0)
    monkeypatch.setattr(count_module, "LEAST_ROWS", 7)
    assert len(count_units(plan).items) == 7


@pytest.mark.parametrize(("total", "count"), [(1, 5), (48, 48), (48, 2000), (1000, 100), (236_574, 2000)])
def test_scattered_rows(total: int, count: int) -> None:
    rows = scattered(total, count)
    n = min(total, count)
    assert all(k * total // n <= row < (k + 1) * total // n for k, row in enumerate(sorted(rows)))  # one in each part
    assert len(rows) == n
    if count < total:
        assert 0.4 < np.mean([r % 2 for r in rows]) < 0.6  # of both views
        assert abs(np.mean(rows[: count // 4]) / total - 0.5) < 0.1  # when time is up after a quarter of them


def test_mean_follows_what_is_known() -> None:
    assert mean_at(np.array([30, 10, 20]), np.array([3.0, 1.0, 2.0]), 5.0) == pytest.approx(50)  # ten for each box
    assert mean_at(np.array([7, 9]), np.array([4.0, 4.0]), 100.0) == 8  # nothing to follow
    assert mean_at(np.array([0, 10]), np.array([10.0, 20.0]), 0.0) == 0


class Passes(NullReporter):
    """Counts the micro-batches that the writer runs."""

    def __init__(self) -> None:
        self.count = 0

    def advance(self, units: int = 1, info: str = "") -> None:
        self.count += bool(info)


def test_micro_batches_are_those_of_the_writer(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    plan, passes = plan_of(shapes, teacher, "rm"), Passes()
    sizes = {plan.source.geometry(plan.item(r)).canvas.size for r in range(48)}
    assert len(sizes) == 2  # both orientations: short groups are filled up
    write_store(plan, tmp_path / "store", passes)
    assert passes.count > 48 / 4
    assert count_micro_batches(plan, range(plan.schema.num_shards)) == passes.count


PACE = StageTimings(
    load=0.01, load_cpu=0.008, teacher=0.4, front=0.5, front_cpu=0.9, encode=0.02, start=0.2, drain=0.3, shard=0.2, byte=1e-8,
    evaluate=0.6,
)  # fmt: skip
WORK = Workload(
    rows=800, micro_batches=110, micro_batch=8, shards=4, bytes=10**8, val_rows=80, val_batches=11, workers=2, cores=2
)  # fmt: skip


def test_the_slowest_stage_decides() -> None:
    found = stage_seconds(PACE, WORK)
    assert found == {
        "teacher": pytest.approx(55), "loading": pytest.approx(4), "encoding": pytest.approx(16),
        "disk": pytest.approx(1.8), "cores": pytest.approx((99 + 6.4) / 2),
    }  # fmt: skip
    # 11 micro-batches of val, slowed down by what 8 images cost to load; two starts, and the end
    val, rest = 11 * (0.6 + 0.064), 0.2 + 0.2 + 0.3
    assert run_seconds(PACE, WORK) == pytest.approx(55 + val + rest)
    assert run_seconds(replace(PACE, front=0.41), WORK) == pytest.approx(52.7 + 11 * 0.61 + rest)  # the cores decide
    alone = replace(WORK, workers=0)  # images are loaded between the passes
    assert stage_seconds(PACE, alone) == {**found, "loading": 0, "cores": pytest.approx(99 / 2)}
    assert run_seconds(PACE, alone) == pytest.approx(55 + 11 * 0.6 + 0.8 + rest)
    assert run_seconds(PACE, replace(WORK, val_rows=0, val_batches=0)) == pytest.approx(55 + 0.5)
    assert run_seconds(replace(PACE, load=1.0), WORK) == pytest.approx(400 + 40 + rest)
    assert run_seconds(replace(PACE, byte=1e-5), WORK) == pytest.approx(1000.8 + val + rest)
    assert run_seconds(replace(PACE, encode=1.0), WORK) == pytest.approx(800 + val + rest)
    assert run_seconds(replace(PACE, load_cpu=1.0), WORK) == pytest.approx((99 + 800) / 2 + 11 * 0.7 + rest)


def test_break_even() -> None:
    found = break_even(store_seconds=120.0, images=100, image_seconds=0.5)
    assert found.live_epoch_seconds == pytest.approx(50)
    assert found.epochs == pytest.approx(2.4)
    assert found.students == pytest.approx(0.2)
    assert found.epochs_each == 12
    assert found.store_seconds == 120


def test_a_part(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    plan = plan_of(shapes, teacher, "rm")
    found = estimate(plan, tmp_path / "store", Part(4, 5))  # the last of five shards, of 8 rows
    assert found.rows == 48
    assert found.seconds < found.break_even.store_seconds
    assert found.bytes_total > 48 * 400  # of the whole store


def test_an_object_store_has_no_end(shapes: Path, teacher: Path) -> None:
    found = estimate(plan_of(shapes, teacher, "rm"), ObjectStorage("s3://bucket/store"))  # nobody asks it anything
    assert found.free_bytes is None
    assert not found.disk_timed


def test_a_folder_that_is_not_there(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    found = estimate(plan_of(shapes, teacher, "rm"), tmp_path / "deep" / "store")
    assert not found.disk_timed
    assert found.free_bytes is not None
    assert list(tmp_path.iterdir()) == []


def test_what_is_printed(
    shapes: Path, teacher: Path, default_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["cache-teacher", "--data", shapes, "--teacher", teacher, "--method", "ld,rm,pfi", "--workers", 0]
    command += ["--threads", 1, "--micro-batch", 4, "--shard-rows", 10, "--out", tmp_path / "store", "--estimate"]
    assert run([*map(str, command), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert set(found) == set(Estimate.__dataclass_fields__)
    assert found["slowest"] in STAGES
    assert found["seconds"] > 0
    even = found["break_even"]
    assert even["epochs"] == pytest.approx(even["store_seconds"] / even["live_epoch_seconds"])
    assert even["students"] == pytest.approx(even["epochs"] / 12)
    assert found["bytes_total"] == pytest.approx(sum(written_bytes(default_store).values()), rel=0.1)
    lines = err.splitlines()
    assert lines[0].startswith("estimate: 48 rows, ")
    assert f"break-even: as long as a live teacher's forward passes in {even['epochs']:.1f} epochs" in err
    assert "features@all: " in err
    assert " 0.00 " not in err
    assert os.listdir(tmp_path) == []
