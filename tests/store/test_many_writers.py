"""Several processes fill one store; some are killed. Nothing is lost, and nothing tells how many there were."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from kdcli.store.encoding_error import Measured
from kdcli.store.maintenance import record_errors
from kdcli.store.manifest import read_manifest, write_manifest
from kdcli.store.reader import StoreReader
from kdcli.store.writer import StoreWriter
from tests.support.selection import matrix
from tests.support.store_case import assert_row_equal, contents, create, keys, make_row, make_store
from tests.support.writers import SCHEMA, fill, forked


def generation(store: Path, count: int, draw: random.Random, *, overlap: bool, kill: bool) -> int:
    """``count`` writers at the same time; returns how many were killed, each at a moment of its own."""
    pids = []
    for index in range(count):
        shards = list(range(SCHEMA.num_shards)) if overlap else list(range(index, SCHEMA.num_shards, count))
        pids.append(forked(partial(fill, store, shards, 0.004 if kill else 0)))
    killed = 0
    for pid in pids:
        if kill and draw.random() < 0.6:
            time.sleep(draw.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            killed += 1
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return killed


def rounds(folder: Path, counts: Sequence[int], seed: int, *, overlap: bool) -> list[int]:
    """Each of ``counts``: so many writers, then another number of them, all killed at random moments or not, then a third
    number to the end; returns how many were killed in each round."""
    make_store(folder / "whole", SCHEMA)
    whole = contents(folder / "whole")
    draw = random.Random(seed)
    kills = []
    for step, count in enumerate(counts):
        store = folder / f"s{step}"
        create(store, SCHEMA)
        others = draw.sample([n for n in range(1, 6) if n != count], 2)
        killed = generation(store, count, draw, overlap=overlap, kill=True)
        killed += generation(store, others[0], draw, overlap=overlap, kill=True)
        generation(store, others[1], draw, overlap=overlap, kill=False)
        assert contents(store) == whole  # no lock or temporary file is left either
        kills.append(killed)
        reader = StoreReader(store)
        for index, key in enumerate(keys()):
            assert_row_equal(reader.read(key), make_row(SCHEMA, index))
    return kills


@pytest.mark.parametrize("overlap", matrix([False, True]), ids=["disjoint", "overlapping"])
def test_killed_writers_lose_nothing(tmp_path: Path, overlap: bool) -> None:
    assert sum(rounds(tmp_path, (2, 3, 5), seed=1, overlap=overlap)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("overlap", [False, True], ids=["disjoint", "overlapping"])
def test_twenty_rounds_of_killed_writers(tmp_path: Path, overlap: bool, count: int) -> None:
    kills = rounds(tmp_path, [count] * 20, seed=count, overlap=overlap)
    assert len(kills) == 20
    assert sum(kills) > 20


@pytest.mark.full
def test_writers_that_end_together_do_not_hinder_each_other(tmp_path: Path) -> None:
    store = tmp_path / "s"
    create(store, SCHEMA)
    numbers = {"squares": 1.0, "reference": 4.0, "count": 4.0, "worst": 0.5}
    sums = Measured(encoding={"rank@main": numbers})
    for shard in range(SCHEMA.num_shards):
        rows = [make_row(SCHEMA, index) for index in range(*SCHEMA.shard_range(shard))]
        StoreWriter(store, SCHEMA).write_shard(shard, rows, sums)
    empty = read_manifest(store)
    for _ in range(6):
        write_manifest(store, empty)
        ready, go = os.pipe()
        pids = [forked(partial(record_when_told, store, ready)) for _ in range(4)]
        os.write(go, b"....")
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 4
        os.close(ready)
        os.close(go)
        errors = Measured(encoding={"rank@main": {"rms": 0.5, "relative": 0.5, "worst": 0.5}})
        assert read_manifest(store) == replace(empty, errors=errors)
        assert not [name for name in contents(store) if name.endswith((".tmp", ".lock"))]


def record_when_told(store: Path, ready: int) -> None:
    """Sum up the errors as soon as a byte comes."""
    os.read(ready, 1)
    record_errors(store)
