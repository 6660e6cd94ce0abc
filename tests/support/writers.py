"""Processes that fill one store."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from kdcli.store.writer import StoreWriter
from tests.support.store_case import make_row, make_schema, measured

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
        writer.write_shard(shard, rows, measured(len(rows)))
