"""Several processes fill one store; some are killed. Nothing is lost, and nothing tells how many there were."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from store_case import assert_row_equal, contents, create, keys, make_row, make_schema, make_store

from kdcli.cache.reader import CacheReader
from kdcli.cache.writer import StoreWriter

SCHEMA = make_schema()


def forked(work: Callable[[], None]) -> int:
    """Run ``work`` in a child of this warmed process; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def fill(store: Path, shards: list[int], pause: float) -> None:
    """Write ``shards`` that are not finished, row by row, with a pause that a kill may fall into."""
    writer = StoreWriter(store, SCHEMA)
    for shard in shards:
        if shard in writer.done():
            continue
        rows = []
        for index in range(*SCHEMA.shard_range(shard)):
            rows.append(make_row(SCHEMA, index))
            time.sleep(pause)
        writer.write_shard(shard, rows, {"rows": len(rows)})


def rounds(folder: Path, number: int, seed: int, *, overlap: bool) -> list[int]:
    """``number`` times: two, three or five writers, each killed at a random moment or not, then one to the end."""
    make_store(folder / "whole", SCHEMA)
    whole = contents(folder / "whole")
    draw = random.Random(seed)
    kills = []
    for step in range(number):
        store, count = folder / f"s{step}", (2, 3, 5)[step % 3]
        create(store, SCHEMA)
        pids = []
        for index in range(count):
            shards = list(range(SCHEMA.num_shards)) if overlap else list(range(index, SCHEMA.num_shards, count))
            pids.append(forked(partial(fill, store, shards, 0.004)))
        killed = 0
        for pid in pids:
            if draw.random() < 0.6:
                time.sleep(draw.uniform(0, 0.02))
                os.kill(pid, signal.SIGKILL)
                killed += 1
            status = os.waitpid(pid, 0)[1]
            assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        kills.append(killed)
        fill(store, list(range(SCHEMA.num_shards)), 0)
        assert contents(store) == whole  # no lock or temporary file is left either
        reader = CacheReader(store)
        for index, key in enumerate(keys()):
            assert_row_equal(reader.read(key), make_row(SCHEMA, index))
    return kills


@pytest.mark.parametrize("overlap", [False, True], ids=["disjoint", "overlapping"])
def test_killed_writers_lose_nothing(tmp_path: Path, overlap: bool) -> None:
    assert sum(rounds(tmp_path, 3, seed=1, overlap=overlap)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True], ids=["disjoint", "overlapping"])
def test_twenty_rounds_of_killed_writers(tmp_path: Path, overlap: bool) -> None:
    kills = rounds(tmp_path, 20, seed=2, overlap=overlap)
    assert len(kills) == 20
    assert sum(kills) > 10
