"""Damaged, foreign and unfinished stores: always a StoreError that names the file and the fix, never wrong data."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcli.errors import StoreError
from kdcli.store.arrays import shard_key
from kdcli.store.checksummed_json import add_checksum
from kdcli.store.encoding_error import Measured
from kdcli.store.manifest import read_manifest
from kdcli.store.reader import StoreReader
from kdcli.store.writer import StoreWriter
from tests.support.rebind import reseal
from tests.support.selection import matrix
from tests.support.store_case import (
    SHARD_ROWS,
    assert_row_equal,
    create,
    keys,
    make_row,
    make_schema,
    make_store,
)

SCHEMA = make_schema()
PATHS = [a.path for a in SCHEMA.layout()]
ROWS_OF_SHARD_1 = keys()[SHARD_ROWS : 2 * SHARD_ROWS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "whole.zarr"
    make_store(path, SCHEMA)
    return path


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    """A complete store that the test may spoil."""
    return Path(shutil.copytree(whole, tmp_path / "store"))


def file_of(store: Path, path: str, shard: int = 1) -> Path:
    spec = next(a for a in SCHEMA.layout() if a.path == path)
    return store / shard_key(spec, shard)


def read_shard_1(reader: StoreReader) -> None:
    for key in ROWS_OF_SHARD_1:
        reader.read(key)


def flipped(data: bytes, position: int, bit: int = 0) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("path", ["entries/count", "entries/flag", "tensors/rank@main/values"])
def test_a_flipped_bit_anywhere_in_a_shard_is_found(store: Path, path: str) -> None:
    file, packed = file_of(store, path), pickle.dumps(StoreReader(store))
    data = file.read_bytes()
    for position in range(0, len(data), 1 if len(data) < 200 else 5):  # chunk data, their crc32c, index, its crc32c
        file.write_bytes(flipped(data, position, position % 8))
        reader = pickle.loads(packed)
        with pytest.raises(StoreError, match="run `kdcli cache verify`") as caught:
            read_shard_1(reader)
        assert str(file) in str(caught.value), position
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("where", matrix(["first byte", "end of the last chunk", "index", "last byte"]))
def test_a_flipped_byte_in_every_array_is_found(store: Path, path: str, where: str) -> None:
    file = file_of(store, path)
    data = file.read_bytes()
    index = 16 * SHARD_ROWS + 4
    position = {"first byte": 0, "end of the last chunk": len(data) - index - 1, "index": len(data) - index + 3}
    file.write_bytes(flipped(data, position.get(where, len(data) - 1)))
    reader = StoreReader(store)
    with pytest.raises(StoreError, match="broken index" if where in ("index", "last byte") else "checksum") as caught:
        read_shard_1(reader)
    assert str(file) in str(caught.value)
    for index, key in enumerate(keys()):  # the other shards are as good as ever
        if key not in ROWS_OF_SHARD_1:
            assert_row_equal(reader.read(key), make_row(SCHEMA, index))


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_shard_is_found(store: Path, kept: float) -> None:
    file = file_of(store, "tensors/features@all/values")
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(StoreError, match="broken index") as caught:
        StoreReader(store).read(ROWS_OF_SHARD_1[0])
    assert str(file) in str(caught.value)


def test_a_shard_with_bytes_cut_out_of_its_middle_is_found(store: Path) -> None:
    file = file_of(store, "tensors/features@all/values")
    data = file.read_bytes()
    file.write_bytes(data[:100] + data[150:])  # the index at the end is whole
    reader = StoreReader(store)
    for key in ROWS_OF_SHARD_1:
        with pytest.raises(StoreError, match="is not the one that the journal names"):
            reader.read(key)


def test_a_missing_shard_is_found(store: Path) -> None:
    file = file_of(store, "entries/weight")
    file.unlink()
    with pytest.raises(StoreError, match="is missing") as caught:
        StoreReader(store).read(ROWS_OF_SHARD_1[0])
    assert str(file) in str(caught.value)


def test_shards_of_other_arrays_are_refused(store: Path) -> None:
    # whole and with right checksums, but of another size
    shutil.copy(file_of(store, "entries/index"), file_of(store, "entries/flag"))
    with pytest.raises(StoreError, match="entries/flag/c/1/0' is not the one that the journal names"):
        StoreReader(store).read(ROWS_OF_SHARD_1[0])
    reseal(store, 1)
    with pytest.raises(StoreError, match="holds 176 bytes instead of 44"):
        StoreReader(store).read(ROWS_OF_SHARD_1[0])


def test_a_row_that_was_never_written_is_found(store: Path) -> None:
    # the last shard holds rows 12 and 13; rows 14 and 15 are MISSING in its index
    shutil.copy(file_of(store, "row/geometry", 3), file_of(store, "row/geometry", 1))
    reseal(store, 1)
    reader = StoreReader(store)
    reader.read(ROWS_OF_SHARD_1[1])
    with pytest.raises(StoreError, match="has no data for its row 2"):
        reader.read(ROWS_OF_SHARD_1[2])


def test_an_unfinished_store_is_refused(store: Path) -> None:
    (store / "journal" / "000002.json").unlink()
    with pytest.raises(StoreError, match="incomplete: 3 of 4 shards are written; run the same cache-teacher command"):
        StoreReader(store)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"shard": "x"}', '"text"'])
def test_a_broken_journal_file_is_named(store: Path, text: str) -> None:
    (store / "journal" / "000002.json").write_text(text)
    with pytest.raises(StoreError, match=r"000002\.json' is corrupt; delete it and run cache-teacher again"):
        StoreReader(store)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"\xff\xfe\x00", b"[]", b"3", b"{}", b'{"attributes": 3}', b'{"attributes": {"kdcli": []}}'],
)
def test_a_garbage_manifest_is_no_store(store: Path, content: bytes) -> None:
    (store / "zarr.json").write_bytes(content)
    with pytest.raises(StoreError, match="is not a kdcli store"):
        StoreReader(store)


def test_a_folder_or_file_that_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a kdcli store"):
        StoreReader(tmp_path)
    (tmp_path / "file").write_text("hello")
    with pytest.raises(StoreError, match="is not a kdcli store"):
        StoreReader(tmp_path / "file")


def change_manifest(store: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((store / "zarr.json").read_text())
    manifest = document["attributes"]["kdcli"]
    change(manifest)
    document["attributes"]["kdcli"] = add_checksum(manifest)  # as a foreign writer would: this is about what it says
    (store / "zarr.json").write_text(json.dumps(document))


def test_the_format_of_a_later_kdcli_is_refused(store: Path) -> None:
    change_manifest(store, lambda m: m.update(version=99))
    with pytest.raises(StoreError, match="format version 99, this kdcli reads 1"):
        StoreReader(store)


@pytest.mark.parametrize("field", ["schema", "views", "format", "version"])
def test_a_manifest_without_a_field_is_refused(store: Path, field: str) -> None:
    change_manifest(store, lambda m: m.pop(field))
    with pytest.raises(StoreError):
        StoreReader(store)


@pytest.mark.parametrize("views", [[], 5, "identity", None, ["identity"]])
def test_views_that_do_not_fit_the_rows_are_refused(store: Path, views: object) -> None:
    change_manifest(store, lambda m: m.update(views=views))
    with pytest.raises(StoreError):
        StoreReader(store)


@pytest.mark.parametrize("canvas", ["32x32", "1000000000x1000000000", "33", 7])
def test_a_schema_that_the_shards_do_not_fit(store: Path, canvas: object) -> None:
    change_manifest(store, lambda m: m["schema"].update(canvas=canvas))
    with pytest.raises(StoreError):
        StoreReader(store).read(keys()[2])


def test_a_broken_list_of_images_is_named(store: Path) -> None:
    (file,) = [f for f in (store / "image_id" / "c").rglob("*") if f.is_file()]
    data = file.read_bytes()
    for position in range(len(data)):
        file.write_bytes(flipped(data, position, position % 8))
        with pytest.raises(StoreError, match="image_id"):
            StoreReader(store)
    file.unlink()
    with pytest.raises(StoreError, match="image_id"):
        StoreReader(store)


def test_an_impossible_list_of_images_is_not_allocated(store: Path) -> None:
    header = store / "image_id" / "zarr.json"
    document = json.loads(header.read_text())
    document["shape"] = [2**44]
    header.write_text(json.dumps(document))
    with pytest.raises(StoreError, match="image"):
        StoreReader(store)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"zarr_format": 3, "node_type": "group"}'])
def test_a_garbage_header_of_the_list_of_images(store: Path, text: str) -> None:
    (store / "image_id" / "zarr.json").write_text(text)
    with pytest.raises(StoreError, match="image_id"):
        StoreReader(store)


def test_a_foreign_zarr_group_is_not_a_store(tmp_path: Path) -> None:
    create(tmp_path / "s", SCHEMA)
    change_manifest(tmp_path / "s", lambda m: m.update(format="something else"))
    with pytest.raises(StoreError, match="format is 'something else'"):
        read_manifest(tmp_path / "s")


def test_an_impossible_count_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "s"
    create(store, SCHEMA)
    for shard in range(SCHEMA.num_shards):
        rows = [make_row(SCHEMA, i) for i in range(*SCHEMA.shard_range(shard))]
        rows[0]["entries/count"] = np.array([-1 if shard else 10_000], np.int32)
        StoreWriter(store, SCHEMA).write_shard(shard, rows, Measured())
    reader = StoreReader(store)
    with pytest.raises(StoreError, match="image 7, view identity: impossible entries/count 10000"):
        reader.read(keys()[0])
    with pytest.raises(StoreError, match="impossible entries/count -1"):
        reader.read(keys()[SHARD_ROWS])
    reader.read(keys()[1])
