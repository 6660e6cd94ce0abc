"""What belongs to a store and what does not: bytes in their places, shards of another store, rows of another image."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdcli.engine.caching.edit import merge, prune_views
from kdcli.engine.caching.verify import verify_checksums
from kdcli.engine.runtime.progress import NullReporter
from kdcli.errors import StoreError
from kdcli.store.arrays import shard_key
from kdcli.store.checksums import crc_bytes, crc_hex
from kdcli.store.journal import JournalEntry, journal_key, read_journal
from kdcli.store.manifest import read_manifest
from kdcli.store.reader import StoreReader
from kdcli.store.schema import StoreSchema
from kdcli.store.writer import StoreWriter, create_store
from tests.support.files import contents
from tests.support.rebind import reseal
from tests.support.store_case import (
    IMAGE_IDS,
    assert_row_equal,
    keys,
    make_manifest,
    make_row,
    make_schema,
    make_store,
    measured,
)

SCHEMA = make_schema()
OLD = replace(SCHEMA, version=1)
LAYOUT = {array.path: array for array in SCHEMA.layout()}
TENSOR = "tensors/features@all/values"
SHARD = 1


def of_another_teacher(path: Path, schema: StoreSchema = SCHEMA) -> Path:
    """A store that differs in its teacher alone, and so in its tensors."""
    manifest = make_manifest(schema)
    other = replace(manifest, teacher=replace(manifest.teacher, weights_sha256="1" * 64))
    assert create_store(path, other, IMAGE_IDS)
    writer = StoreWriter(path, schema)
    for shard in range(schema.num_shards):
        rows = []
        for index in range(*schema.shard_range(shard)):
            row = make_row(schema, index)
            rows.append({p: v[..., ::-1].copy() if p.startswith("tensors/") else v for p, v in row.items()})
        writer.write_shard(shard, rows, measured(len(rows)))
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    make_store(tmp_path / "s", SCHEMA)
    return tmp_path / "s"


def swap_rows(file: Path, first: int, second: int, rows: int) -> None:
    """Exchange two chunks of the same length, whose checksums go with them."""
    data = file.read_bytes()
    index = np.frombuffer(data[-16 * rows - 4 : -4], "<u8").reshape(rows, 2)
    (a, size), (b, other) = (tuple(map(int, index[n])) for n in (first, second))
    assert size == other
    changed = bytearray(data)
    changed[a : a + size], changed[b : b + size] = data[b : b + size], data[a : a + size]
    assert bytes(changed) != data
    assert crc_hex(bytes(changed)) == crc_hex(data)  # all that format version 1 compares
    file.write_bytes(changed)


def verify(store: Path) -> tuple[int, int]:
    return verify_checksums(store, NullReporter())


def test_rows_that_changed_places_are_found(store: Path) -> None:
    swap_rows(store / shard_key(LAYOUT["entries/count"], SHARD), 0, 1, SCHEMA.shard_rows)
    with pytest.raises(StoreError, match=r"entries/count/c/1/0' is not what was written; delete '.*000001\.json'"):
        verify(store)


def test_a_row_of_another_image_is_not_read(store: Path) -> None:
    """All arrays of two rows, and the journal with them: what a row says of itself is left."""
    swap_rows(store / shard_key(LAYOUT["row/identity"], SHARD), 0, 1, SCHEMA.shard_rows)
    key = keys()[SCHEMA.shard_rows]
    with pytest.raises(StoreError, match="its row is of another image or view"):
        StoreReader(store).read(key)
    StoreReader(store).read(keys()[0])
    reseal(store, SHARD)
    for read in (lambda: StoreReader(store).read(key), lambda: verify(store)):
        with pytest.raises(StoreError, match=f"image {key.image_id}, view {key.view}: its row is of another"):
            read()


def test_image_ids_of_another_store_are_found(store: Path, tmp_path: Path) -> None:
    create_store(tmp_path / "other", make_manifest(SCHEMA), IMAGE_IDS[::-1].copy())
    shutil.copy(tmp_path / "other" / "image_id" / "c" / "0", store / "image_id" / "c" / "0")
    with pytest.raises(StoreError, match="its row is of another image or view"):
        verify(store)


@pytest.mark.parametrize("whole", [True, False])
def test_a_shard_of_another_teacher_is_refused(store: Path, tmp_path: Path, whole: bool) -> None:
    """With its journal file, and its tensors alone."""
    other = of_another_teacher(tmp_path / "other")
    paths = list(LAYOUT) if whole else [TENSOR]
    for path in paths:
        shutil.copy(other / shard_key(LAYOUT[path], SHARD), store / shard_key(LAYOUT[path], SHARD))
    words = "is not the one that the journal names"
    if whole:
        shutil.copy(other / journal_key(SHARD), store / journal_key(SHARD))
        words = r"journal/000001\.json' belongs to another store"
    with pytest.raises(StoreError, match=words):
        StoreReader(store).read(keys()[SCHEMA.shard_rows])
    with pytest.raises(StoreError):
        verify(store)


def test_a_manifest_of_another_store_is_refused(store: Path, tmp_path: Path) -> None:
    shutil.copy(of_another_teacher(tmp_path / "other") / "zarr.json", store / "zarr.json")
    with pytest.raises(StoreError, match="belongs to another store"):
        StoreReader(store)


@pytest.mark.parametrize("name", ["zarr.json", "journal/000001.json"])
def test_a_byte_more_is_found_where_it_changes_no_value(store: Path, name: str) -> None:
    file = store / name
    data = file.read_bytes()
    places = [n for n, byte in enumerate(data) if byte in b" \n"]
    assert len(places) > 50
    for place in places[::7]:
        for changed in (data[:place] + b"\t" + data[place + 1 :], data[:place] + b" " + data[place:]):
            assert json.loads(changed) is not None
            file.write_bytes(changed)
            with pytest.raises(StoreError):
                verify(store)
    file.write_bytes(data)
    assert verify(store)[0] == SCHEMA.num_shards * len(LAYOUT)


def test_the_journal_says_which_store_it_is_of(store: Path) -> None:
    manifest, entry = read_manifest(store), read_journal(store)[SHARD]
    assert entry.store == manifest.binding
    document = json.loads((store / journal_key(SHARD)).read_text())
    assert document["store"] == manifest.binding
    assert set(document["files"][TENSOR]) == {"bytes", "sha256", "index"}
    # what is measured, added or dropped later does not change it
    later = replace(manifest, methods=("ld",), errors=None, schema=replace(SCHEMA, tensors=SCHEMA.tensors[:1]))
    assert later.binding == manifest.binding
    assert replace(manifest, teacher=replace(manifest.teacher, ap=7.0)).binding == manifest.binding
    for other in (
        replace(manifest, view_seed=1), replace(manifest, schema=replace(SCHEMA, rows=12)),
        replace(manifest, teacher_run=replace(manifest.teacher_run, precision="bf16")),
    ):  # fmt: skip
        assert other.binding != manifest.binding


def test_a_store_of_format_1_is_read_and_continued(tmp_path: Path) -> None:
    assert create_store(tmp_path / "s", make_manifest(OLD), IMAGE_IDS)
    writer = StoreWriter(tmp_path / "s", OLD)
    for shard in (0, 2, 3, 1):
        writer.write_shard(shard, [make_row(OLD, n) for n in range(*OLD.shard_range(shard))], measured(4))
    document = json.loads((tmp_path / "s" / journal_key(0)).read_text())
    assert "store" not in document
    assert set(document["files"][TENSOR]) == {"bytes", "crc32c"}
    reader = StoreReader(tmp_path / "s")
    assert reader.schema.version == 1
    for index, key in enumerate(keys()):
        assert_row_equal(reader.read(key), make_row(OLD, index))
    assert verify(tmp_path / "s")[0] == OLD.num_shards * len(LAYOUT)


@pytest.mark.parametrize(("ours", "theirs"), [(SCHEMA, OLD), (OLD, SCHEMA)])
def test_an_entry_of_the_other_version_is_refused(tmp_path: Path, ours: StoreSchema, theirs: StoreSchema) -> None:
    make_store(tmp_path / "s", ours)
    make_store(tmp_path / "t", theirs)
    shutil.copy(tmp_path / "t" / journal_key(SHARD), tmp_path / "s" / journal_key(SHARD))
    with pytest.raises(StoreError, match=r"000001\.json' is corrupt"):
        StoreReader(tmp_path / "s")


def test_copies_are_of_the_oldest_format_among_their_sources(tmp_path: Path) -> None:
    for name, schema in (("new", SCHEMA), ("old", OLD)):
        make_store(tmp_path / name, schema)
    for name in ("new", "old"):
        prune_views(tmp_path / name, ["hflip"], tmp_path / f"{name}-identity", NullReporter())
    prune_views(tmp_path / "new", ["identity"], tmp_path / "new-hflip", NullReporter())
    versions = {}
    for name in ("new", "old"):
        out = tmp_path / f"{name}-merged"
        merge([tmp_path / f"{name}-identity", tmp_path / "new-hflip"], out, None, NullReporter())
        versions[name] = read_manifest(out).schema.version
        verify(out)
        reader = StoreReader(out)
        for index, key in enumerate(keys()):
            assert_row_equal(reader.read(key), make_row(SCHEMA, index))
    assert versions == {"new": 2, "old": 1}
    assert read_manifest(tmp_path / "old-identity").schema.version == 1
    # in the same order it is the store that was cut in two, but for the sums of measured errors
    same = contents(tmp_path / "new-merged")
    assert {k for k, v in contents(tmp_path / "new").items() if same[k] != v} <= {
        "zarr.json", *(journal_key(shard) for shard in range(SCHEMA.num_shards))
    }  # fmt: skip


def test_entries_are_spelt_as_they_are_written(store: Path) -> None:
    entry = read_journal(store)[SHARD]
    assert entry.to_bytes() == (store / journal_key(SHARD)).read_bytes()
    plain = entry.to_json()
    assert JournalEntry.from_json(plain, "000001.json", 2) == entry
    for name, value in (("store", "x"), ("store", None)):
        with pytest.raises(ValueError, match="impossible store"):
            JournalEntry.from_json({**plain, name: value}, "000001.json", 2)
    assert crc_bytes(b"") == bytes(4)


def test_a_copy_does_not_bless_what_changed_places(store: Path, tmp_path: Path) -> None:
    """It gets digests of its own."""
    swap_rows(store / shard_key(LAYOUT["entries/count"], SHARD), 0, 1, SCHEMA.shard_rows)
    with pytest.raises(StoreError, match=r"entries/count/c/1/0' is not what was written"):
        prune_views(store, ["hflip"], tmp_path / "copy", NullReporter())
