"""Shard files with right checksums and wrong contents; manifests and journals with anything, under a right checksum."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zstandard

from kdcli.errors import StoreError
from kdcli.store.arrays import shard_key
from kdcli.store.journal import read_journal
from kdcli.store.manifest import read_manifest
from kdcli.store.reader import StoreReader
from kdcli.store.shards import MISSING, pack_chunk, pack_shard
from kdcli.store.writer import create_store
from tests.support.hostile_case import (
    SCHEMA,
    Change,
    attempts,
    entry_file,
    make,
    manifest_file,
    require_harmless,
    require_refused,
)
from tests.support.store_case import SHARD_ROWS, keys, make_manifest

INDEX_BYTES = 16 * SHARD_ROWS + 4
LAST = 2**64 - 1
LAYOUT = {a.path: a for a in SCHEMA.layout()}
DENSE, SPARSE = "tensors/features@all/values", "tensors/box_distribution@main+vlr/values"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store; each attempt leaves it as it was."""
    return make(tmp_path_factory.mktemp("stores") / "s")


def crc(data: bytes) -> bytes:
    """What a chunk and an index end in."""
    value: int = google_crc32c.value(data)
    return value.to_bytes(4, "little")


def with_index(data: bytes, index: list[list[int]]) -> bytes:
    """A shard file with another index, whose checksum is right."""
    tail = np.array(index, "<u8").tobytes()
    return data[:-INDEX_BYTES] + tail + crc(tail)


def with_chunk(data: bytes, frame: bytes) -> bytes:
    """A shard file whose first chunk is ``frame``, with right checksums everywhere."""
    rest = [data[offset : offset + length] for offset, length in index_of(data)[1:]]
    return pack_shard([frame + crc(frame), *rest], SHARD_ROWS)


def index_of(data: bytes) -> list[list[int]]:
    """Offset and length of each chunk."""
    found: list[list[int]] = np.frombuffer(data[-INDEX_BYTES:-4], "<u8").reshape(-1, 2).tolist()
    return found


def frame(declared: int | None, size: int, *, window_log: int | None = None) -> bytes:
    """A zstd frame of ``size`` zeros, in blocks of at most 128 KiB that take 4 bytes each, which declares another size."""
    blocks = b""
    for start in range(0, size, 2**17):
        part = min(2**17, size - start)
        last = start + part == size
        blocks += ((part << 3) | (1 << 1) | last).to_bytes(3, "little") + b"\0"
    window = b"" if window_log is None else bytes([(window_log - 10) << 3])
    content = b"" if declared is None else declared.to_bytes(8, "little")
    flags = (0 if declared is None else 0b11000000) | (0b00100000 if window_log is None and declared is not None else 0)
    if declared is None and window_log is None:
        window = bytes([(20 - 10) << 3])
    return b"\x28\xb5\x2f\xfd" + bytes([flags]) + window + content + blocks


def test_the_frames_of_these_tests_are_zstd() -> None:
    for made in (frame(300_000, 300_000), frame(None, 300_000), frame(300_000, 300_000, window_log=25)):
        with zstandard.ZstdDecompressor().stream_reader(made) as stream:
            assert stream.read() == bytes(300_000)


def bad_indices(data: bytes) -> Iterator[tuple[str, list[list[int]]]]:
    """Indices of a shard of four chunks that no writer makes."""
    good = index_of(data)
    size, (offset, length) = len(data), good[1]
    for name, second in {
        "beyond the file": [size, length],
        "end beyond the file": [offset, size],
        "into the index": [offset, size - offset - 10],
        "sum of 2^64": [LAST - length + 1, length],
        "sum over 2^64": [LAST - 1, 2**63],
        "negative offset": [2**64 - 8, length],
        "negative length": [offset, 2**64 - 8],
        "2^60 bytes": [offset, 2**60],
        "2^60 bytes at 0": [0, 2**60],
        "nothing": [offset, 0],
        "three bytes": [offset, 3],
        "missing": [MISSING, MISSING],
        "half missing": [MISSING, length],
        "the row before": good[0],
        "the row behind": good[2],
        "one byte early": [offset - 1, length],
        "one byte late": [offset + 1, length],
        "two rows": [offset, length + good[2][1]],
    }.items():
        yield name, [good[0], second, *good[2:]]
    yield "all one row", [good[0]] * 4
    yield "turned round", good[::-1]
    yield "first missing", [[MISSING, MISSING], *good[1:]]


@pytest.mark.parametrize("path", ["row/identity", DENSE, SPARSE])
def test_a_hostile_index_is_refused(store: Path, path: str) -> None:
    key = shard_key(LAYOUT[path], 1)
    data = (store / key).read_bytes()
    require_refused(attempts(store, [Change(n, key, with_index(data, index)) for n, index in bad_indices(data)]))


@pytest.mark.parametrize("path", ["entries/count", DENSE, SPARSE])
def test_a_hostile_chunk_is_refused(store: Path, path: str) -> None:
    key = shard_key(LAYOUT[path], 1)
    data, full = (store / key).read_bytes(), LAYOUT[path].row_bytes
    good = zstandard.ZstdCompressor().compress(np.random.default_rng(0).bytes(full))
    frames = {
        "declares 2^40": frame(2**40, full),
        "declares 2^63": frame(2**63, full),
        "declares 2^64 - 1": frame(LAST, full),
        "declares 2^64 - 2": frame(LAST - 1, full),
        "is 2 GB": frame(2**31, 2**31),
        "holds 2 GB": frame(full, 2**31),
        "declares nothing, holds 2 GB": frame(None, 2**31),
        "declares nothing": frame(None, full),
        "a window of 2 GB": frame(full, full + 1, window_log=31),
        "declares 0": frame(0, full),
        "one byte more": frame(full, full + 1),
        "one byte less": frame(full, full - 1),
        "half": good[: len(good) // 2],
        "header alone": good[:12],
        "magic alone": good[:4],
        "no zstd": b"\0" * 100,
        "nothing": b"",
        "skippable": b"\x50\x2a\x4d\x18" + (100).to_bytes(4, "little") + bytes(100),
        "a dictionary": good[:4] + bytes([good[4] | 1]) + good[5:],
        "noise": np.random.default_rng(1).bytes(500),
        "noise behind the header": good[:5] + np.random.default_rng(2).bytes(500),
    }
    if (
        path == SPARSE
    ):  # of which only the real entries are decompressed: row 4 has some, and what is behind is not read
        frames = {k: v for k, v in frames.items() if k not in ("holds 2 GB", "one byte more", "one byte less", "half")}
    require_refused(attempts(store, [Change(name, key, with_chunk(data, f)) for name, f in frames.items()]))


def test_hostile_entries_are_refused(store: Path) -> None:
    reader = StoreReader(store)
    row = SHARD_ROWS + 1
    row += next(k for k in range(2) if len(reader.read(keys()[row + k]).entries.index) > 2)  # type: ignore[union-attr]
    given = reader.read(keys()[row]).entries
    assert given is not None
    index, flag = given.index.numpy().astype(np.int32), given.flag.numpy()
    values = {
        "index beyond the anchors": ("entries/index", np.append(index[:-1], 44)),
        "index of 2^31 - 1": ("entries/index", np.append(index[:-1], 2**31 - 1)),
        "negative index": ("entries/index", np.append(-1, index[1:])),
        "index falls": ("entries/index", index[::-1]),
        "index twice": ("entries/index", np.append(index[:1], index[:-1])),
        "unknown flag": ("entries/flag", np.append(flag[:-1], 128)),
        "count of 45": ("entries/count", np.array([45])),
        "negative count": ("entries/count", np.array([-1])),
        "count of 2^31 - 1": ("entries/count", np.array([2**31 - 1])),
    }
    changes = []
    for name, (path, value) in values.items():
        array = LAYOUT[path]
        key = shard_key(array, 1)
        data = (store / key).read_bytes()
        chunks: list[bytes | None] = [data[offset : offset + length] for offset, length in index_of(data)]
        chunks[row % SHARD_ROWS] = pack_chunk(value.astype(array.dtype), array)
        changes.append(Change(name, key, pack_shard(chunks, SHARD_ROWS)))
    require_refused(attempts(store, changes))


def test_something_that_is_no_file_in_the_place_of_a_shard(store: Path, tmp_path: Path) -> None:
    ours = Path(shutil.copytree(store, tmp_path / "s"))
    file = ours / shard_key(LAYOUT["row/identity"], 1)
    file.unlink()
    file.mkdir()
    with pytest.raises(StoreError, match="is a folder, not a file"):
        StoreReader(ours).read(keys()[SHARD_ROWS])
    shutil.rmtree(file.parent)
    file.parent.write_text("")
    with pytest.raises(StoreError, match="is missing"):
        StoreReader(ours).read(keys()[SHARD_ROWS])


def test_one_image_with_id_0_has_a_file_too(tmp_path: Path) -> None:
    create_store(tmp_path / "s", make_manifest(SCHEMA), np.array([0]))
    assert (tmp_path / "s" / "image_id" / "c" / "0").is_file()  # zarr-python writes no chunk of fill values by itself


ANYTHING: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 14, 2**31, 2**62, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "..", "/etc/passwd", "\0", "a" * 5000, "identity", "main", "float16", [], [[]], [0], [0] * 1000, [None], {},
    {"a": 1}, {"name": "float16"}, [[[[[[[[[[]]]]]]]]]],
]  # fmt: skip


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a JSON document."""
    names = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for name in names:
        yield (*path, name)
        yield from places(document[name], (*path, name))


def mutated(document: Any, draw: random.Random) -> tuple[str, Any]:
    """A copy of ``document`` with one value taken away, doubled, exchanged for one beside it, or for anything."""
    changed = copy.deepcopy(document)
    # whether two views have changed places only the geometry in the rows can tell, which the engine compares
    path = draw.choice([p for p in places(document) if p[0] != "views" or len(p) == 1])
    parent = changed
    for name in path[:-1]:
        parent = parent[name]
    last, how = path[-1], draw.choice(["anything", "anything", "anything", "gone", "doubled", "exchanged", "stretched"])
    beside = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    value = parent[last]
    if how == "gone":
        del parent[last]
    elif how == "doubled" and isinstance(parent, list):
        parent.append(value)
    elif how == "exchanged":
        parent[last], parent[beside] = parent[beside], value
    elif how == "stretched" and isinstance(value, (int, float)):
        parent[last] = value * draw.choice([-1, 2, 10, 1000, 2**40, 0.5, 1e-9])
    else:
        parent[last] = draw.choice(ANYTHING)
    return f"{how} at {'.'.join(map(str, path))}: {json.dumps(parent)[:80]}", changed


def mutations(store: Path, number: int, seed: int) -> list[Change]:
    """Mutated manifests and journal entries."""
    draw = random.Random(seed)
    manifest, entry = read_manifest(store).to_json(), read_journal(store)[1].to_json()
    changes = []
    for k in range(number):
        if k % 3:
            name, document = mutated(manifest, draw)
            changes.append(Change(name, "zarr.json", manifest_file(document)))
        else:
            name, document = mutated(entry, draw)
            changes.append(Change(name, "journal/000001.json", entry_file(document)))
    return changes


def require_equal_or_refused(store: Path, number: int, seed: int) -> None:
    """Every mutation reads as the store that it was, or is refused; many are refused."""
    results = attempts(store, mutations(store, number, seed))
    for result in results:
        require_harmless(result)
    assert sum(r.reading == "StoreError" for r in results) > number / 2


def test_a_mutated_manifest_or_journal_reads_the_same_or_not_at_all(store: Path) -> None:
    require_equal_or_refused(store, 300, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_many_mutated_manifests_and_journals(store: Path, seed: int) -> None:
    require_equal_or_refused(store, 1500, seed)
