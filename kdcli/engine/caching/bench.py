"""``cache bench``: how fast the rows of a store can be read here, and what that means for a training step."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, get_worker_info

from kdcli.engine.loading.workers import attempt, begin, made_by
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.store.batch_buffers import collate_rows
from kdcli.store.journal import read_journal
from kdcli.store.reader import StoreReader
from kdcli.store.storage.base import Where
from kdcli.structures import RowKey
from kdcli.tensors import Need, Tensors

WARM_BATCHES = 4  # starting a worker takes longer than they do


@dataclass(frozen=True)
class Speed:
    """Reading with ``workers`` processes (0: in this one)."""

    workers: int
    rows: int
    seconds: float
    megabytes: float  # on disk, of the rows read

    @property
    def rows_per_s(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds

    def wait_percent(self, batch: int, step_s: float) -> float:
        """Share of a training step that waits for data, when nothing but the store is read: 0 while reading keeps up."""
        reading = batch / self.rows_per_s
        # without workers nothing is read while the step computes
        late = reading if self.workers == 0 else max(0.0, reading - step_s)
        return 100 * late / (step_s + late)


def bench(
    store: Where,
    needs: Sequence[Need] | None,
    workers: Sequence[int],
    batch: int,
    rows: int,
    reporter: ProgressReporter,
) -> list[Speed]:
    """Read ``rows`` random rows in batches, for each number of ``workers``; the same rows each time.

    Raises StoreError for a store that cannot be read.
    """
    reader = StoreReader(store, needs)
    draw = np.random.default_rng(0).integers(0, reader.schema.rows, rows + WARM_BATCHES * batch)
    views, images = reader.views, reader.image_ids
    keys = [RowKey(images[int(r) // len(views)], views[int(r) % len(views)]) for r in draw]
    batches = [keys[k : k + batch] for k in range(0, len(keys), batch)]
    per_row = _bytes_a_row(reader) / 2**20
    reporter.stage("cache bench", rows * len(workers))
    found = []
    for number in workers:
        loader: DataLoader[Any] = DataLoader(
            _Rows(reader, batches),
            batch_size=None,
            num_workers=number,
            prefetch_factor=4 if number else None,
            worker_init_fn=begin,
        )
        started, read = 0.0, 0
        for k, made in enumerate(made_by(loader)):
            if k == WARM_BATCHES - 1:
                started = time.perf_counter()
            elif k >= WARM_BATCHES:
                read += made.rows
                reporter.advance(made.rows)
        found.append(Speed(number, read, time.perf_counter() - started, read * per_row))
    return found


def _bytes_a_row(reader: StoreReader) -> float:
    """Mean bytes on disk of the arrays that are read."""
    wanted = set(reader.layout)
    total = sum(
        file.size
        for entry in read_journal(reader.storage).values()
        for path, file in entry.files.items()
        if path in wanted
    )
    return total / reader.schema.rows


def default_workers() -> list[int]:
    """In this process, then one worker, two, four, up to the cores there are."""
    cores = os.cpu_count() or 1
    return [0, *(n for n in (1, 2, 4, 8, 16) if n <= cores)]


class _Rows(Dataset[Any]):
    """Batches of rows, which travel to the main process as they do in training."""

    def __init__(self, reader: StoreReader, batches: list[list[RowKey]]) -> None:
        self._reader, self._batches = reader, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Any:
        return attempt(self._read, index)

    def _read(self, index: int) -> _Batch:
        rows = self._reader.read_all(self._batches[index], shared=get_worker_info() is not None)
        return _Batch(collate_rows(rows, self._reader.layout.values()), len(rows))


@dataclass(frozen=True)
class _Batch:
    arrays: Tensors
    rows: int
