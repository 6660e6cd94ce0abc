"""Stores in an object store: the same objects as a folder's files, through a network that breaks, in any process."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from kdcli.cli.main import run
from kdcli.engine.caching.verify import verify_checksums
from kdcli.engine.runtime.progress import NullReporter
from kdcli.errors import MissingPathError, OptionError, StoreError
from kdcli.store.encoding_error import Measured
from kdcli.store.journal import read_journal, store_digest
from kdcli.store.reader import StoreReader
from kdcli.store.storage import object_store as remote_module
from kdcli.store.storage.object_store import ObjectStorage
from kdcli.store.storage.resolve import open_storage
from kdcli.store.writer import StoreWriter, create_store
from tests.support.store_case import (
    IMAGE_IDS,
    contents,
    create,
    keys,
    make_manifest,
    make_row,
    make_schema,
    make_store,
)
from tests.support.store_case import write as write_shards
from tests.support.writers import fill, forked

pytest.importorskip("moto")
pytest.importorskip("obstore")
from tests.support.object_case import read_everything
from tests.support.s3_case import BUCKET, Proxy, Server, prefix, use
from tests.support.selection import matrix

pytestmark = pytest.mark.usefixtures("s3")
SCHEMA = make_schema()
ROWS = range(SCHEMA.rows)


def test_objects_are_a_folders_files(server: Server, whole: str, tmp_path: Path) -> None:
    make_store(tmp_path / "s", SCHEMA)
    assert server.objects("whole") == contents(tmp_path / "s")
    assert store_digest(whole) == store_digest(tmp_path / "s")


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "zarr"])
def test_every_row_comes_back(whole: str, direct: bool) -> None:
    read_everything(StoreReader(whole, direct=direct))


def test_a_row_is_two_requests(whole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[list[str]] = []
    real = ObjectStorage._ask

    def spy(self: ObjectStorage, jobs: Any, body: bytes = b"", *, missing: bool = False) -> Any:
        asked_for.append([job["do"] for job in jobs])
        return real(self, jobs, body, missing=missing)

    reader = StoreReader(whole)
    monkeypatch.setattr(ObjectStorage, "_ask", spy)
    reader.read(keys()[0])
    arrays = len(reader.layout)
    assert asked_for == [["tail"] * arrays, ["range"] * arrays]
    asked_for.clear()
    reader.read(keys()[1])  # of the same shard: its indices are known
    assert [jobs for jobs in asked_for if jobs] == [["range"] * arrays]


class Rows:
    """What a data worker reads."""

    def __init__(self, reader: StoreReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> bytes:
        return self.reader.read(keys()[index]).content


@pytest.mark.parametrize("start", matrix(["fork", "spawn"]))
def test_data_workers_read(whole: str, start: str) -> None:
    reader = StoreReader(whole)
    reader.read(keys()[0])  # obstore's threads would now be lost by a fork
    context = multiprocessing.get_context(start)
    loader = DataLoader(
        Rows(reader), batch_size=None, num_workers=2 if start == "fork" else 1, multiprocessing_context=context
    )
    assert list(loader) == [make_row(SCHEMA, index)["row/identity"].tobytes()[:32] for index in ROWS]
    reader.read(keys()[5])


def test_a_killed_writer_goes_on(server: Server, url: str) -> None:
    create(url, SCHEMA)
    pid = forked(partial(fill, url, list(range(SCHEMA.num_shards)), 0.05))
    while not read_journal(url):
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(read_journal(url)) < SCHEMA.num_shards
    with pytest.raises(StoreError, match=r"incomplete: \d of 4"):
        StoreReader(url)
    fill(url, list(range(SCHEMA.num_shards)), 0)
    assert server.objects(prefix(url)) == server.objects("whole")


def test_parts_in_several_processes_make_the_same_store(server: Server, url: str) -> None:
    create(url, SCHEMA)
    pids = [forked(partial(fill, url, [part, part + 2], 0)) for part in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert server.objects(prefix(url)) == server.objects("whole")


def test_one_of_two_makers_wins(server: Server, url: str) -> None:
    create(url, SCHEMA)
    create(url, SCHEMA)  # the same bytes: whose they are does not matter
    before = server.objects(prefix(url))
    assert not create_store(url, make_manifest(SCHEMA, view_seed=1), IMAGE_IDS)
    with pytest.raises(StoreError, match="is of another store"):
        create(url, make_schema("lossless"))
    left = server.objects(prefix(url))
    assert {name: left[name] for name in before} == before


def test_a_journalled_shard_is_not_written_again(server: Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(url, SCHEMA)
    before = server.objects(prefix(url))
    other = [make_row(SCHEMA, 5)] * 4
    assert StoreWriter(url, SCHEMA).write_shard(1, other, Measured()) == 0
    assert server.objects(prefix(url)) == before
    # two at the same time: neither has seen the other's journal entry when it began
    real = ObjectStorage.has
    monkeypatch.setattr(ObjectStorage, "has", lambda self, key: "journal" not in key and real(self, key))
    write_shards(url, SCHEMA, [1])  # the same numbers
    assert server.objects(prefix(url)) == before
    with pytest.raises(StoreError, match="by two processes at the same time"):
        StoreWriter(url, SCHEMA).write_shard(1, other, Measured())
    assert sorted(read_journal(url)) == [0, 2, 3]
    monkeypatch.undo()


@contextmanager
def breaking(proxy: Proxy) -> Iterator[list[float]]:
    """Cuts the network four times, 0.2 s each; the moments."""
    done, cuts = threading.Event(), []

    def work() -> None:
        while len(cuts) < 4 and not done.wait(0.15):
            cuts.append(time.monotonic())
            proxy.cut()
            time.sleep(0.2)
            proxy.mend()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield cuts
    finally:
        done.set()
        thread.join()


def test_reading_goes_on_when_the_network_breaks(proxy: Proxy, whole: str) -> None:
    reader = StoreReader(whole)
    with breaking(proxy) as cuts:
        while len(cuts) < 4:
            read_everything(reader)
    read_everything(reader)


def test_writing_goes_on_when_the_network_breaks(server: Server, proxy: Proxy, whole: str, url: str) -> None:
    with breaking(proxy) as cuts:
        make_store(url, SCHEMA)
    assert len(cuts) > 1
    assert server.objects(prefix(url)) == server.objects("whole")


def test_a_network_that_stays_away_is_one_line(proxy: Proxy, whole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, proxy.port, patience=0.5)
    reader = StoreReader(whole)
    proxy.cut()
    with pytest.raises(StoreError, match="no answer from the object store") as caught:
        reader.read(keys()[0])
    assert f"{whole}/" in str(caught.value)
    assert "\n" not in str(caught.value)
    proxy.mend()
    read_everything(reader)  # the next read finds it back


def test_a_carrier_that_was_killed_is_one_line(whole: str) -> None:
    reader = StoreReader(whole)
    remote_module._worker()._process.kill()
    with pytest.raises(StoreError, match="the process that reads it has ended"):
        reader.read(keys()[0])
    read_everything(reader)


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and error of a command line."""
    capsys.readouterr()
    code = run(list(arguments))
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    return code, error


def test_errors_of_the_command_line(
    server: Server, whole: str, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = failing(capsys, "cache", "info", "s3://no-such-bucket/x")
    assert (code, "there is no such bucket" in error) == (3, True), error
    code, error = failing(capsys, "cache", "info", url)
    assert (code, f"store '{url}' does not exist" in error) == (3, True), error
    for wrong in ("http://host/x", "s3://", "memory://x"):
        code, error = failing(capsys, "cache", "info", wrong)
        assert (code, "names no store" in error) == (3, True), error
    code, error = failing(capsys, "cache", "prune", whole, "--tensor", "rank@main")
    assert (code, "copy the store to a disk first" in error) == (3, True), error
    use(monkeypatch, 1, patience=0.3)
    code, error = failing(capsys, "cache", "info", whole)
    assert (code, "no answer" in error, whole in error) == (4, True, True), error
    use(monkeypatch, server.port, patience=0.3, credentials=False)
    code, error = failing(capsys, "cache", "info", whole)
    assert (code, "AWS_ACCESS_KEY_ID" in error, whole in error) == (4, True, True), error
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, error = failing(capsys, "cache", "info", whole)
    assert (code, "pip install 'kdcli[remote]'" in error) == (3, True), error


def test_a_path_is_no_url() -> None:
    with pytest.raises(OptionError, match="pass it as a str"):
        open_storage(Path("s3://bucket/store"))
    with pytest.raises(MissingPathError):
        StoreReader(Path("no/such/store"))


def test_a_broken_object_is_found(server: Server, url: str) -> None:
    make_store(url, SCHEMA)
    key = f"{prefix(url)}/tensors/features@all/values/c/1/0/0"
    data = bytearray(server.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    data[10] ^= 1
    server.client.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
    with pytest.raises(StoreError, match=r"fails the checksum of its row 0; run `kdcli cache verify`"):
        StoreReader(url).read(keys()[4])
    with pytest.raises(StoreError, match="is not what was written"):
        verify_checksums(url, NullReporter())
    server.client.delete_object(Bucket=BUCKET, Key=key)
    with pytest.raises(StoreError, match="is missing"):
        StoreReader(url).read(keys()[4])
    with pytest.raises(StoreError, match=r"is missing; delete '.*/journal/000001.json'"):
        verify_checksums(url, NullReporter())
