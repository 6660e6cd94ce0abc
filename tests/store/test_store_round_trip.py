"""What was written is what is read: by the direct reader and by zarr's own, in any process, twice the same bytes."""

from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zarrs import ZarrsCodecPipeline

from kdcli.errors import MissingPathError, StoreError
from kdcli.store.arrays import ArraySpec
from kdcli.store.batch_buffers import collate_arrays
from kdcli.store.checksummed_json import add_checksum
from kdcli.store.encoding_error import Measured
from kdcli.store.journal import read_journal, store_digest
from kdcli.store.manifest import read_manifest
from kdcli.store.reader import StoreReader
from kdcli.store.row_identity import pack_identity
from kdcli.store.schema import StoreSchema
from kdcli.store.shards import decompress, pack_chunk
from kdcli.store.storage import local as local_module
from kdcli.store.writer import StoreWriter
from kdcli.structures import RowKey
from kdcli.tensors import CENTERNESS, FEATURES, Need
from tests.support.store_case import (
    CANVAS,
    GRID,
    IMAGE_IDS,
    NEEDS,
    VIEWS,
    assert_row_equal,
    contents,
    create,
    keys,
    make_manifest,
    make_row,
    make_schema,
    make_store,
    measured,
    write,
)

SCHEMA = make_schema()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store; not to be changed."""
    path = tmp_path_factory.mktemp("stores") / "whole.zarr"
    make_store(path, SCHEMA)
    return path


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "zarr"])
def test_every_row_comes_back(store: Path, direct: bool) -> None:
    reader = StoreReader(store, direct=direct)
    assert reader.schema == SCHEMA
    for index, key in enumerate(keys()):
        assert reader.row_index(key) == index
        row = reader.read(key)
        written = make_row(SCHEMA, index)
        assert set(row.arrays) == {path for path in written if path.startswith("tensors/")}
        assert_row_equal(row, written)


@pytest.mark.parametrize("encoding", ["compact", "float16", "lossless"])
def test_other_encodings_come_back(tmp_path: Path, encoding: str) -> None:
    schema = make_schema(encoding)
    make_store(tmp_path / "s", schema)
    direct, judge = StoreReader(tmp_path / "s"), StoreReader(tmp_path / "s", direct=False)
    for index, key in list(enumerate(keys()))[:5]:
        assert_row_equal(direct.read(key), make_row(schema, index))
        assert_row_equal(judge.read(key), make_row(schema, index))


@pytest.mark.parametrize("installed", [True, False], ids=["zarrs", "zarr alone"])
def test_both_pipelines_of_zarr_give_the_same(store: Path, monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    assert local_module.ZARRS  # it is here
    if not installed:
        monkeypatch.setattr(local_module, "ZARRS", {})
    used = []
    read = ZarrsCodecPipeline.read

    async def spy(*arguments: Any, **more: Any) -> Any:
        used.append(1)
        return await read(*arguments, **more)

    monkeypatch.setattr(ZarrsCodecPipeline, "read", spy)
    reader = StoreReader(store, direct=False)
    for index, key in enumerate(keys()):
        assert_row_equal(reader.read(key), make_row(SCHEMA, index))
    assert bool(used) == installed


@pytest.mark.parametrize("need", NEEDS, ids=lambda n: n.key)
def test_a_reader_of_one_need_reads_that_alone(store: Path, need: Need) -> None:
    reader = StoreReader(store, [need])
    row = reader.read(keys()[3])
    assert {path.split("/")[1] for path in row.arrays} == {need.key}
    assert_row_equal(row, make_row(SCHEMA, 3))


def test_a_store_of_dense_tensors_has_no_entries(tmp_path: Path) -> None:
    schema = make_schema(needs=(Need(FEATURES, "all"),))
    assert schema.regions == frozenset()
    make_store(tmp_path / "s", schema)
    row = StoreReader(tmp_path / "s").read(keys()[1])
    assert row.entries is None
    assert set(row.arrays) == {"tensors/features@all/values", "tensors/features@all/affine"}


def test_a_batch_decodes_as_its_rows(store: Path) -> None:
    reader = StoreReader(store)
    rows = [reader.read(key).arrays for key in keys()[:4]]
    together = SCHEMA.decode(collate_arrays(rows, reader.layout.values()), NEEDS)
    alone = [SCHEMA.decode(collate_arrays([row], reader.layout.values()), NEEDS) for row in rows]
    assert set(together) == {n.key for n in NEEDS}
    for need in NEEDS:
        parts = torch.cat([a[need.key] for a in alone])
        assert torch.equal(together[need.key], parts), need.key
        assert together[need.key].dtype == torch.float32
        if need.dense:
            assert together[need.key].shape[:2] == (4, GRID.num_total(CANVAS))


def test_rows_are_the_callers_own(store: Path) -> None:
    reader = StoreReader(store)
    first = reader.read(keys()[4])
    for value in first.arrays.values():
        value[...] = 1
    assert_row_equal(reader.read(keys()[4]), make_row(SCHEMA, 4))


def test_a_reader_travels_to_another_process(store: Path) -> None:
    reader = StoreReader(store)
    reader.read(keys()[0])
    assert reader._shards
    data = pickle.dumps(reader)
    assert len(data) < 20_000
    copy = pickle.loads(data)
    assert not copy._shards
    for index in (0, 5, 13):
        assert_row_equal(copy.read(keys()[index]), make_row(SCHEMA, index))


def test_few_files_stay_open(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for most, shards in ((2, 1), (2 * len(SCHEMA.layout()), 2)):  # a row needs one file of each array
        monkeypatch.setattr(local_module, "MAX_OPEN_FILES", most)
        reader = StoreReader(store)
        for index in np.random.default_rng(0).permutation(len(keys())):
            assert_row_equal(reader.read(keys()[index]), make_row(SCHEMA, int(index)))
            assert len(reader._shards) <= shards
        assert len(reader._shards) == shards


def test_threads_share_a_reader(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that closes files while another one reads them."""
    monkeypatch.setattr(local_module, "MAX_OPEN_FILES", 2)
    reader = StoreReader(store)
    order = np.random.default_rng(0).integers(len(keys()), size=400)
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda index: reader.read(keys()[index]), order))
    for index, row in zip(order, rows, strict=True):
        assert_row_equal(row, make_row(SCHEMA, int(index)))


def test_an_unknown_image_or_view_is_refused(store: Path) -> None:
    reader = StoreReader(store)
    with pytest.raises(StoreError, match="no row for image 999: its data set had no such image id"):
        reader.read(RowKey(999, "identity"))
    with pytest.raises(StoreError, match="no view 'crop-1'; it has identity, hflip"):
        reader.read(RowKey(int(IMAGE_IDS[0]), "crop-1"))


def test_a_need_that_is_not_there_is_named(store: Path) -> None:
    with pytest.raises(StoreError, match=r"lacks centerness@all; it has .*features@all"):
        StoreReader(store, [NEEDS[0], Need(CENTERNESS, "all")])
    assert StoreError.exit_code == 4


@pytest.mark.parametrize("real", [1, 7, 44])
def test_the_zeros_behind_a_row_have_blocks_of_their_own(real: int) -> None:
    array = ArraySpec("a", (40_000, 3), "int32", "entries/count")
    value = np.random.default_rng(0).integers(-9, 9, (real, 3)).astype(np.int32)
    chunk = pack_chunk(value, array)
    padded = np.concatenate([value, np.zeros_like(value, shape=(500, 3))])
    assert pack_chunk(padded, array) == chunk
    full = np.zeros(array.shape, np.int32)
    full[:real] = value
    assert np.array_equal(decompress(chunk[:-4], array, array.shape), full)
    # 480,000 bytes of zeros are at least three blocks of four bytes, which are not needed for what is before them
    assert np.array_equal(decompress(chunk[:-16], array, value.shape), value)


@pytest.mark.parametrize("count", [None, "entries/count"])
def test_nothing_is_packed_as_zeros(count: str | None) -> None:
    array = ArraySpec("a", (40_000, 3), "int32", count)
    chunk = pack_chunk(np.zeros((0, 3)), array)
    assert chunk == pack_chunk(np.zeros(array.shape), array)
    assert not decompress(chunk[:-4], array, array.shape).any()


def test_an_all_zero_row_is_stored(tmp_path: Path) -> None:
    create(tmp_path / "s", SCHEMA)
    writer = StoreWriter(tmp_path / "s", SCHEMA)
    zero = {a.path: np.zeros(a.shape, a.dtype)[: 0 if a.sparse else None] for a in SCHEMA.layout()}
    for shard in range(SCHEMA.num_shards):
        start, stop = SCHEMA.shard_range(shard)
        own = [pack_identity(bytes(32), bytes(16), key, SCHEMA.version) for key in keys()[start:stop]]
        writer.write_shard(shard, [{**zero, "row/identity": identity} for identity in own], Measured())
    row = StoreReader(tmp_path / "s").read(keys()[6])
    assert row.content == bytes(32)
    assert row.arrays["tensors/features@all/values"].shape == (44, 3)
    assert not any(value.any() for value in row.arrays.values())


def test_the_same_rows_make_the_same_bytes(store: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "elsewhere" / "again", SCHEMA)
    ours, theirs = contents(tmp_path / "elsewhere" / "again"), contents(store)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert store_digest(store) == store_digest(tmp_path / "elsewhere" / "again")


def test_the_order_of_shards_does_not_matter(store: Path, tmp_path: Path) -> None:
    create(tmp_path / "s", SCHEMA)
    write(tmp_path / "s", SCHEMA, [3, 1, 0, 2])
    assert contents(tmp_path / "s") == contents(store)


def test_digest_tells_stores_apart(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "s")
    journal = tmp_path / "s" / "journal" / "000002.json"
    other = json.loads(journal.read_text()) | {"measured": measured(5).to_json()}
    journal.write_text(json.dumps(add_checksum(other), sort_keys=True))
    assert store_digest(tmp_path / "s") != store_digest(store)


def test_manifest_and_journal(store: Path) -> None:
    assert read_manifest(store) == make_manifest(SCHEMA)
    journal = read_journal(store)
    assert sorted(journal) == [0, 1, 2, 3]
    assert journal[3].rows == (12, 14)
    assert journal[3].measured == measured(2)
    files = {a.path for a in SCHEMA.layout()}
    assert all(set(entry.files) == files for entry in journal.values())
    shards = [f for f in store.rglob("c/*/**/*") if f.is_file() and "image_id" not in f.parts]
    assert StoreReader(store).bytes_on_disk() == sum(f.stat().st_size for f in shards)


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match="does not exist; write one with `kdcli cache-teacher"):
        StoreReader(tmp_path / "none")


def test_views_fit_the_rows() -> None:
    assert SCHEMA.rows == len(keys()) == len(IMAGE_IDS) * len(VIEWS)
    assert StoreSchema.from_json(json.loads(json.dumps(SCHEMA.to_json()))) == SCHEMA
