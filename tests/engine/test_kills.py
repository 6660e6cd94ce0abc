"""kill -9 at random moments, in a chain: the finished result equals that of an uninterrupted run."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest

from tests.support.files import contents
from tests.support.kills import finish, kdcli, kill_when
from tests.support.small_runs import CANVAS

# columns of results.csv that a clock or the operating system decides
MEASURED = {"images_per_s", "data_wait_percent", "teacher_percent", "epoch_s", "peak_memory_bytes"}


SHARDS = 16  # 24 images in two views, 3 rows a shard


def cache_chain(shapes: Path, teacher: Path, folder: Path, kills: int, seed: int) -> None:
    command = [
        "cache-teacher", "--data", str(shapes), "--teacher", str(teacher), "--method", "ld,rm,pfi", "--workers", "0",
        "--threads", "1", "--shard-rows", "3", "--micro-batch", "4", "--out",
    ]  # fmt: skip
    finish(kdcli(*command, str(folder / "whole")))
    journal = folder / "killed" / "journal"
    draw = random.Random(seed)
    for shards in sorted(draw.sample(range(1, SHARDS - 3), kills)):
        kill_when(
            kdcli(*command, str(folder / "killed")),
            lambda least=shards: journal.is_dir() and len(list(journal.glob("*.json"))) >= least,  # type: ignore[misc]
            draw.uniform(0, 0.03),
        )
    finish(kdcli(*command, str(folder / "killed")))
    assert contents(folder / "killed") == contents(folder / "whole")


def results(run: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((run / "results.csv").read_text().splitlines()))
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def distill_chain(shapes: Path, store: Path, folder: Path, kills: int, seed: int) -> None:
    command = [
        "distill", "--data", str(shapes), "--cache", str(store), "--method", "ld,rm,pfi", "--canvas", CANVAS,
        "--model", "gfl_shufflenet_v2_x0_5", "--set", "model.fpn_channels=32", "--set", "model.tower_convs=1",
        "--epochs", "4", "--batch", "4", "--threads", "1", "--workers", "1", "--set", "train.save_steps=2",
        "--set", "optim.ema=true", "--out",
    ]  # fmt: skip
    finish(kdcli(*command, str(folder / "whole")))
    run = folder / "killed"
    state = run / "weights" / "state.pt"
    draw = random.Random(seed)
    for kill in range(kills):
        before = state.stat().st_mtime_ns if kill else 0
        kill_when(
            kdcli("distill", "--resume", str(run)) if kill else kdcli(*command, str(run)),
            lambda old=before: state.exists() and state.stat().st_mtime_ns != old,  # type: ignore[misc]
            draw.uniform(0, 0.1),
        )
    finish(kdcli("distill", "--resume", str(run)))
    assert results(run) == results(folder / "whole")
    ours, theirs = (json.loads((r / "metrics.json").read_text()) for r in (run, folder / "whole"))
    assert ours["weights_sha256"] == theirs["weights_sha256"]
    assert ours["ap"] == theirs["ap"]
    assert sorted(f for f in contents(run)) == sorted(f for f in contents(folder / "whole"))


@pytest.mark.full
def test_a_killed_cache_teacher_goes_on(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    cache_chain(shapes, teacher, tmp_path, kills=3, seed=1)


@pytest.mark.full
def test_a_killed_distillation_goes_on(shapes: Path, default_store: Path, tmp_path: Path) -> None:
    distill_chain(shapes, default_store, tmp_path, kills=3, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3])
def test_ten_kills_of_cache_teacher(shapes: Path, teacher: Path, tmp_path: Path, seed: int) -> None:
    cache_chain(shapes, teacher, tmp_path, kills=10, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4])
def test_ten_kills_of_a_distillation(shapes: Path, default_store: Path, tmp_path: Path, seed: int) -> None:
    distill_chain(shapes, default_store, tmp_path, kills=10, seed=seed)
