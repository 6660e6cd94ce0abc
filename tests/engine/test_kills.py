"""kill -9 at random moments, in a chain: the finished result equals that of an uninterrupted run."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine.conftest import CANVAS

# columns of results.csv that a clock or the operating system decides
MEASURED = {"images_per_s", "data_wait_percent", "teacher_percent", "epoch_s", "peak_memory_bytes"}


def kdcli(*arguments: str) -> subprocess.Popen[bytes]:
    """Start the command in a process group of its own, so that its data workers are killed with it."""
    return subprocess.Popen(
        [sys.executable, "-m", "kdcli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a clean end."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def kill_after(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """kill -9 the whole group after ``seconds``; False when it had ended by then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            errors = process.communicate()[1]
            assert process.returncode == 0, errors.decode()
            return False
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return True


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def cache_chain(shapes: Path, teacher: Path, folder: Path, kills: int, seed: int) -> None:
    command = [
        "cache-teacher", "--data", str(shapes), "--teacher", str(teacher), "--method", "ld,rm,pfi", "--workers", "0",
        "--threads", "1", "--shard-rows", "3", "--micro-batch", "4", "--out",
    ]  # fmt: skip
    started = time.monotonic()
    finish(kdcli(*command, str(folder / "whole")))
    whole_s = time.monotonic() - started
    draw = random.Random(seed)
    killed = [
        kill_after(kdcli(*command, str(folder / "killed")), draw.uniform(0.3, 0.95) * whole_s) for _ in range(kills)
    ]
    assert killed[0]  # the first one has most of the work before it
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
    started = time.monotonic()
    finish(kdcli(*command, str(folder / "whole")))
    whole_s = time.monotonic() - started
    run = folder / "killed"
    draw = random.Random(seed)
    killed = [kill_after(kdcli(*command, str(run)), draw.uniform(0.4, 0.9) * whole_s)]
    while not run.exists():  # killed before the run began: nothing to resume, and nothing half-made
        killed.append(kill_after(kdcli(*command, str(run)), draw.uniform(0.4, 0.9) * whole_s))
    for _ in range(kills - 1):
        killed.append(kill_after(kdcli("distill", "--resume", str(run)), draw.uniform(0.3, 0.9) * whole_s))
    assert any(killed)
    finish(kdcli("distill", "--resume", str(run)))
    assert results(run) == results(folder / "whole")
    ours, theirs = (json.loads((r / "metrics.json").read_text()) for r in (run, folder / "whole"))
    assert ours["weights_sha256"] == theirs["weights_sha256"]
    assert ours["ap"] == theirs["ap"]
    assert sorted(f for f in contents(run)) == sorted(f for f in contents(folder / "whole"))


def test_a_killed_cache_teacher_goes_on(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    cache_chain(shapes, teacher, tmp_path, kills=3, seed=1)


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
