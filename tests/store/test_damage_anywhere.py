"""One flipped bit, or any cut, anywhere in any file of a store: found by ``cache verify``, and by whoever reads the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kdcli.engine.caching.verify import verify_checksums
from kdcli.engine.runtime.progress import NullReporter
from kdcli.errors import StoreError
from kdcli.store.arrays import shard_key
from kdcli.store.reader import StoreReader
from tests.support.hostile_case import SCHEMA, make
from tests.support.store_case import SHARD_ROWS, assert_row_equal, keys, make_row

INDEX_BYTES = 16 * SHARD_ROWS + 4
SHARDS = [shard_key(array, shard) for array in SCHEMA.layout() for shard in range(SCHEMA.num_shards)]
ARRAYS = [array.path for array in SCHEMA.layout()]
GROUPS = sorted({"/".join(path.split("/")[:k]) for path in ARRAYS for k in range(1, path.count("/") + 1)})
KINDS = {
    "manifest": ["zarr.json"],
    "journal": [f"journal/{shard:06d}.json" for shard in range(SCHEMA.num_shards)],
    "image ids": ["image_id/c/0"],
    "chunks of shards": SHARDS,
    "index of shards": SHARDS,
    "headers of arrays": [f"{path}/zarr.json" for path in (*ARRAYS, "image_id")],
    "headers of groups": [f"{path}/zarr.json" for path in GROUPS],
}
ROWS = [make_row(SCHEMA, index) for index in range(SCHEMA.rows)]
NOT_READ = ("headers of arrays", "headers of groups")  # by kdcli itself; other readers of Zarr go by them


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store; each damage is repaired."""
    return make(tmp_path_factory.mktemp("stores") / "s")


def test_these_are_all_files_of_a_store(store: Path) -> None:
    files = {f.relative_to(store).as_posix() for f in store.rglob("*") if f.is_file()}
    assert files == {name for names in KINDS.values() for name in names}


def damages(store: Path, kind: str, number: int, seed: int) -> Iterator[tuple[str, Path, bytes, bytes]]:
    """What was done, a file, its bytes, and other bytes: flipped bits at random places, cuts to every class of length."""
    draw = np.random.default_rng(seed)
    for k in range(number):
        file = store / str(draw.choice(KINDS[kind]))
        data = file.read_bytes()
        first, last = 0, len(data)
        if kind == "chunks of shards":
            last -= INDEX_BYTES
        elif kind == "index of shards":
            first = last - INDEX_BYTES
        if k % 2:
            position, bit = int(draw.integers(first, last)), int(draw.integers(8))
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            yield f"bit {bit} of byte {position} of {file}", file, data, bytes(changed)
        else:
            size = len(data)
            kept = (0, 1, size // 2, size - 1, int(draw.integers(first, last)))[k // 2 % 5]
            yield f"{kept} of {size} bytes of {file}", file, data, data[:kept]


def error_of(work: Callable[[], object]) -> StoreError | None:
    """The StoreError of ``work``."""
    try:
        work()
    except StoreError as error:
        return error
    return None


def require_found(store: Path, kind: str, number: int, seed: int) -> None:
    """Damage the store in one place, ``number`` times: verify says so, and whoever reads it gets no wrong row."""
    for what, file, before, after in damages(store, kind, number, seed):
        file.write_bytes(after)
        found, refused = error_of(lambda: verify_checksums(store, NullReporter())), rows_refused(store)
        file.write_bytes(before)
        assert found is not None, f"verify did not find {what}"
        require_one_line(found, store)
        assert refused or kind in NOT_READ, what
    verify_checksums(store, NullReporter())
    assert rows_refused(store) == 0


def rows_refused(store: Path) -> int:
    """How many rows are a StoreError; the others have to be the ones that were written."""
    try:
        reader = StoreReader(store)
    except StoreError as error:
        require_one_line(error, store)
        return len(keys())
    refused = 0
    for index, key in enumerate(keys()):
        try:
            row = reader.read(key)
        except StoreError as error:
            require_one_line(error, store)
            refused += 1
        else:
            assert_row_equal(row, ROWS[index])
    return refused


def require_one_line(error: StoreError, store: Path) -> None:
    """It names the store, and is for people."""
    assert error.exit_code == 4
    assert str(store) in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 1000


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found(store: Path, kind: str) -> None:
    require_found(store, kind, 10, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_much_damage_is_found(store: Path, kind: str, seed: int) -> None:
    require_found(store, kind, 250, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zarr.json", "journal/000001.json"])
def test_every_bit_of_what_is_sealed(store: Path, name: str) -> None:
    file = store / name
    before = file.read_bytes()
    for position in range(len(before)):
        for bit in range(8):  # also those that spell a number otherwise: e and E
            after = bytearray(before)
            after[position] ^= 1 << bit
            file.write_bytes(after)
            assert error_of(lambda: StoreReader(store)), f"bit {bit} of byte {position} of {name} was not found"
    file.write_bytes(before)
    StoreReader(store)
