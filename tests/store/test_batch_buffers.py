"""A batch read into its own slots is the batch that its rows make, without a copy; rows of another batch are copied."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcli.store import batch_buffers
from kdcli.store.batch_buffers import allocate_batch, collate_arrays, collate_rows
from kdcli.store.reader import Row, StoreReader
from kdcli.tensors import Tensors
from tests.support.store_case import keys, make_schema, make_store

SCHEMA = make_schema()
ROOMY = {"tensors/features@all/values", "tensors/cls_logits@all/values"}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreReader:
    monkeypatch.setattr(batch_buffers, "LEAST_BYTES", 132)  # of 44 cells of 3 features; their affine numbers are 120
    make_store(tmp_path / "s", SCHEMA)
    return StoreReader(tmp_path / "s")


def expected(reader: StoreReader, batch: slice) -> Tensors:
    return collate_arrays([reader.read(key).arrays for key in keys()[batch]], reader.layout.values())


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        assert found[path].dtype == value.dtype
        assert torch.equal(found[path], value), path


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_is_there_when_its_rows_are(reader: StoreReader, shared: bool) -> None:
    rows = reader.read_all(keys()[:5], shared=shared)
    batch = collate_rows(rows, reader.layout.values())
    assert_same(batch, expected(reader, slice(5)))
    for path in ROOMY:
        assert batch[path].data_ptr() == torch.from_numpy(rows[0].arrays[path]).data_ptr()
        assert batch[path].is_shared() == shared
    assert rows[0].slot is not None
    assert set(rows[0].slot.batch) == ROOMY


@pytest.mark.parametrize("change", ["order", "fewer", "none", "two batches"])
def test_rows_that_are_no_batch_are_copied(reader: StoreReader, change: str) -> None:
    rows: list[Row] = reader.read_all(keys()[:4])
    if change == "order":
        rows = rows[::-1]
    elif change == "fewer":
        rows = rows[:3]
    elif change == "none":
        rows = [reader.read(key) for key in keys()[:4]]
    else:
        rows = rows[:2] + reader.read_all(keys()[:4])[2:]
    batch = collate_rows(rows, reader.layout.values())
    assert_same(batch, collate_arrays([row.arrays for row in rows], reader.layout.values()))
    assert not {batch[path].data_ptr() for path in ROOMY} & {
        torch.from_numpy(row.arrays[path]).data_ptr() for row in rows for path in ROOMY
    }


def test_no_room_for_what_is_small_sparse_or_no_tensor(reader: StoreReader) -> None:
    large = {a.path for a in reader.layout.values() if a.row_bytes >= 132}
    assert large > ROOMY
    assert set(allocate_batch(reader.layout.values(), 2, shared=False)[0].batch) == ROOMY


def _fill(slot: batch_buffers.BatchSlot) -> None:
    for path in slot.batch:
        place = slot.of(path)
        assert place is not None
        place.view(np.uint8)[:] = slot.row + 1
    os._exit(0)


def test_shared_room_is_that_of_all_processes(reader: StoreReader) -> None:
    made = allocate_batch(reader.layout.values(), 2, shared=True)
    for slot in made:
        process = multiprocessing.get_context("fork").Process(target=_fill, args=(slot,))
        process.start()
        process.join()
    for value in made[0].batch.values():
        assert [row.flatten().view(torch.uint8).unique().tolist() for row in value] == [[1], [2]]
