"""One reader in many processes, however they are started: each opens its own files, and all see the same rows."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import multiprocessing
from torch.utils.data import DataLoader, Dataset

from kdcli.engine.caching.plan import plan_store
from kdcli.engine.loading.loader import Loader
from kdcli.engine.loading.samples import Item, SampleSource
from kdcli.engine.runtime.progress import NullReporter
from kdcli.store.reader import Row, StoreReader
from kdcli.structures import RowKey
from tests.support.selection import matrix
from tests.support.small_runs import cache_options

STARTS = ("fork", "spawn", "forkserver")


class Rows(Dataset[Any]):
    """The rows of a reader, as plain bytes, with the process that read them."""

    def __init__(self, reader: StoreReader, keys: list[RowKey]) -> None:
        self.reader, self.keys = reader, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[int, dict[str, bytes]]:
        return os.getpid(), plain(self.reader.read(self.keys[index]))


def plain(row: Row) -> dict[str, bytes]:
    """Everything of a row, as bytes."""
    assert row.entries is not None
    entries = {name: getattr(row.entries, name).numpy().tobytes() for name in ("index", "flag", "gt", "weight")}
    fixed = {"content": row.content, "guard": row.guard, "geometry": row.geometry.tobytes()}
    return {**fixed, **entries, **{path: value.tobytes() for path, value in row.arrays.items()}}


def all_keys(reader: StoreReader) -> list[RowKey]:
    """Every row, in order."""
    return [RowKey(image, view) for image in reader.image_ids for view in reader.views]


def open_files(store: Path) -> list[str]:
    """The files of a store that this process has open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # the listing's own
            continue
    return sorted(name for name in found if str(store) in name)


more_than_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def read_in_workers(store: Path, start: str, workers: int) -> None:
    """Read all rows here, then in workers that get this used reader, and here again while they read."""
    reader = StoreReader(store)
    keys = all_keys(reader)
    ours = [plain(reader.read(key)) for key in keys]  # opens the shard files that a forked worker inherits
    assert open_files(store)
    loader = DataLoader(
        Rows(reader, keys), batch_size=None, num_workers=workers, multiprocessing_context=start, prefetch_factor=2
    )
    pids = set()
    for k, (pid, row) in enumerate(loader):
        assert row == ours[k]
        assert plain(reader.read(keys[-1 - k])) == ours[-1 - k]
        pids.add(pid)
    assert len(pids) == workers
    assert os.getpid() not in pids
    assert [plain(reader.read(key)) for key in keys] == ours  # a worker that ends closes its own files alone


@more_than_cores
@pytest.mark.parametrize("start", matrix(STARTS))
def test_workers_read_the_rows_that_the_parent_reads(default_store: Path, start: str) -> None:
    read_in_workers(default_store, start, workers=2 if start == "fork" else 1)  # each of the others imports torch


@pytest.mark.slow
@more_than_cores
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("workers", [2, 4])
def test_several_workers_read_the_rows_that_the_parent_reads(default_store: Path, start: str, workers: int) -> None:
    read_in_workers(default_store, start, workers)


def test_forked_readers_do_not_move_each_others_place_in_a_file(default_store: Path) -> None:
    reader = StoreReader(default_store)
    keys = all_keys(reader)
    ours = [plain(reader.read(key)) for key in keys]
    pids = []
    for child in range(4):  # all with the descriptors of this process, at the same time
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                order = np.random.default_rng(child).permutation(np.tile(np.arange(len(keys)), 4))
                code = int(any(plain(reader.read(keys[k])) != ours[k] for k in order))
            finally:
                os._exit(code)
        pids.append(pid)
    for _ in range(4):
        assert [plain(reader.read(key)) for key in keys] == ours
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0, 0]


def test_a_used_reader_travels_light(default_store: Path) -> None:
    reader = StoreReader(default_store)
    fresh = pickle.dumps(reader)
    ours = [plain(reader.read(key)) for key in all_keys(reader)]
    used = pickle.dumps(reader)
    assert len(used) == len(fresh)
    # the manifest and the image ids, which are at most 8 bytes each and one of the row number
    assert len(used) < 20_000 + 32 * len(reader.image_ids)
    before = open_files(default_store)
    other = pickle.loads(used)
    assert open_files(default_store) == before  # opened lazily
    assert [plain(other.read(key)) for key in all_keys(other)] == ours
    assert [plain(reader.read(key)) for key in all_keys(reader)] == ours


def test_a_reader_that_goes_closes_its_files(default_store: Path) -> None:
    gc.collect()  # readers of other tests
    reader = StoreReader(default_store)
    assert not open_files(default_store)
    reader.read(all_keys(reader)[0])
    assert len(open_files(default_store)) == len(reader.layout)
    del reader
    gc.collect()
    assert not open_files(default_store)


@pytest.fixture
def start_method(request: pytest.FixtureRequest) -> Iterator[str]:
    """Python's default way to start a process, for one test."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
@more_than_cores
@pytest.mark.parametrize("start_method", STARTS, indirect=True)
def test_batches_of_training_do_not_depend_on_the_start_method(
    shapes: Path, teacher: Path, default_store: Path, start_method: str
) -> None:
    plan = plan_store(cache_options(shapes, teacher), NullReporter())
    source = replace(plan.source, reader=StoreReader(default_store, plan.needs))
    items = [(k, view) for k in range(12) for view in plan.views]
    wide = [item for item in items if source.geometry(item).canvas == source.canvas]
    batches = [wide[k : k + 3] for k in range(0, len(wide), 3)]
    ours, theirs = list(batches_of(source, 0, batches)), list(batches_of(source, 2, batches))
    assert len(ours) == len(theirs) == len(batches)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def batches_of(source: SampleSource, workers: int, batches: list[list[Item]]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each batch."""
    for batch in Loader(source, workers).batches(batches):
        assert batch.entries is not None
        yield {**batch.rows, "images": batch.images, "index": batch.entries.index, "assigned": batch.targets.assigned}
