"""Chunks of an object store that are kept on the local disk."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kdcli.errors import OptionError
from kdcli.store.reader import StoreReader
from kdcli.store.storage.object_store import ObjectStorage
from kdcli.store.storage.resolve import open_storage
from tests.support.rebind import reseal
from tests.support.store_case import keys, make_row, make_schema, make_store
from tests.support.writers import forked

pytest.importorskip("moto")
pytest.importorskip("obstore")
from tests.support.object_case import read_everything
from tests.support.s3_case import BUCKET, Server, prefix

pytestmark = pytest.mark.usefixtures("s3")
SCHEMA = make_schema()


class FetchedChunks:
    """Counts the chunks that come over the network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chunks = 0
        real = ObjectStorage._ask

        def spy(storage: ObjectStorage, jobs: Any, body: bytes = b"", *, missing: bool = False) -> Any:
            self.chunks += sum(job["do"] == "range" for job in jobs)
            return real(storage, jobs, body, missing=missing)

        monkeypatch.setattr(ObjectStorage, "_ask", spy)


def kept(folder: Path) -> list[Path]:
    return [f for f in folder.rglob("*") if f.is_file()]


def test_the_read_cache(server: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(url, SCHEMA)
    monkeypatch.setenv("KDCLI_READ_CACHE", str(tmp_path / "kept"))
    fetched = FetchedChunks(monkeypatch)
    reader = StoreReader(url)
    read_everything(reader)
    files, arrays = kept(tmp_path / "kept"), len(reader.layout)
    assert len(files) == fetched.chunks == SCHEMA.rows * arrays
    fetched.chunks = 0
    read_everything(StoreReader(url))
    assert fetched.chunks == 0
    # a flipped bit, a torn file, an empty one: fetched again, and right the next time
    for k, change in enumerate((lambda d: bytes([d[0] ^ 4]) + d[1:], lambda d: d[: len(d) // 2], lambda d: b"")):
        files[k].write_bytes(change(files[k].read_bytes()))
    read_everything(reader)
    assert fetched.chunks == 3
    read_everything(reader)
    assert fetched.chunks == 3
    # another store at the same URL: nothing of the old one is read
    key = f"{prefix(url)}/row/geometry/c/0/0"
    other = server.client.get_object(Bucket=BUCKET, Key=f"{prefix(url)}/row/geometry/c/1/0")["Body"].read()
    server.client.put_object(Bucket=BUCKET, Key=key, Body=other)
    reseal(url, 0)
    row = StoreReader(url).read(keys()[0])
    assert row.geometry.tolist() == make_row(SCHEMA, 4)["row/geometry"].tolist()


def test_the_read_cache_is_bounded_with_several_processes(
    whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = 2 * 2**20  # of the 1.1 MB that each store would take, eight times
    monkeypatch.setenv("KDCLI_READ_CACHE", str(tmp_path))
    monkeypatch.setenv("KDCLI_READ_CACHE_GB", str(bound / 2**30))
    reader = StoreReader(whole)
    reader.storage._cache._share //= 4  # type: ignore[attr-defined]
    pids = [forked(partial(read_everything, reader)) for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    used = sum(f.stat().st_blocks * 512 for f in kept(tmp_path))
    assert 0.2 * bound / 4 < used <= 1.25 * bound / 4
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.mark.full
def test_what_was_read_last_stays(tmp_path: Path) -> None:
    from kdcli.store.storage.read_cache import PARTS, ReadCache

    cache = ReadCache(tmp_path, PARTS * 64 * 4096)
    chunk = b"data" + remote_chunk_crc(b"data")
    cache.put("often", chunk)
    for number in range(PARTS * 100):
        cache.put(str(number), chunk)
        if number % 50 == 0:
            assert cache.get("often") == chunk, number
    assert cache.get("0") is None


@pytest.mark.parametrize("when", ["before it has its name", "after"])
def test_another_process_makes_room_while_a_chunk_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    from kdcli.store.storage.read_cache import ReadCache

    cache, replace = ReadCache(tmp_path, 2**30), os.replace
    chunk = b"data" + remote_chunk_crc(b"data")

    def raced(source: Path, target: Path) -> None:
        if when == "after":
            replace(source, target)
        for file in tmp_path.rglob("*"):
            if file.is_file():
                file.unlink()
        if when != "after":
            replace(source, target)

    monkeypatch.setattr(os, "replace", raced)
    cache.put("name", chunk)
    assert cache.get("name") is None
    monkeypatch.undo()
    cache.put("name", chunk)
    assert cache.get("name") == chunk


def remote_chunk_crc(data: bytes) -> bytes:
    import google_crc32c

    return int(google_crc32c.value(data)).to_bytes(4, "little")


def test_a_size_that_is_no_number(whole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_READ_CACHE", "somewhere")
    monkeypatch.setenv("KDCLI_READ_CACHE_GB", "much")
    with pytest.raises(OptionError, match="KDCLI_READ_CACHE_GB='much' is not a number"):
        open_storage(whole)
