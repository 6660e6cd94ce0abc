"""Interrupted writing: killed, out of space, torn. The finished shards stay, and going on gives the same bytes."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from kdcli import files
from kdcli.errors import KDError, MissingPathError, NoSpaceError, StoreError
from kdcli.store.arrays import shard_key
from kdcli.store.manifest import read_manifest
from kdcli.store.reader import StoreReader
from kdcli.store.storage import local as places
from kdcli.store.writer import StoreWriter, create_store
from tests.support.store_case import (
    IMAGE_IDS,
    SHARD_ROWS,
    assert_row_equal,
    contents,
    create,
    keys,
    make_manifest,
    make_row,
    make_schema,
    make_store,
    write,
)

SCHEMA = make_schema()
ARRAYS = len(SCHEMA.layout())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a store that was written without interruption."""
    path = tmp_path_factory.mktemp("stores") / "whole.zarr"
    make_store(path, SCHEMA)
    return contents(path)


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A store of which shards 0 and 1 are written."""
    path = tmp_path / "half.zarr"
    create(path, SCHEMA)
    write(path, SCHEMA, [0, 1])
    return path


def shard_files(store: Path, shard: int) -> list[Path]:
    return [store / shard_key(a, shard) for a in SCHEMA.layout()]


class DiskFull:
    """Lets ``allowed`` files be written and then no more: the next one gets half of its bytes and ENOSPC."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int, code: int = errno.ENOSPC) -> None:
        self.left, self.code = allowed, code
        real = Path.open

        def open_path(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
            return self.open(path) if "w" in mode else real(path, mode, *rest, **more)

        monkeypatch.setattr(Path, "open", open_path)  # zarr
        monkeypatch.setattr(files, "open", lambda path, mode: self.open(path), raising=False)  # the journal

    def open(self, path: Path) -> io.FileIO:
        self.left -= 1
        code = self.code

        class Full(io.FileIO):
            def write(self, data: Any) -> int:
                super().write(bytes(data)[: len(data) // 2])
                raise OSError(code, os.strerror(code))

        return io.FileIO(path, "w") if self.left >= 0 else Full(path, "w")


def test_going_on_after_an_interruption_gives_the_same_bytes(half: Path, whole: dict[str, bytes]) -> None:
    stray = half / "tensors" / "rank@main" / "values" / "c" / "2" / "0" / ".0.1234.tmp"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"half a shard")
    with pytest.raises(StoreError, match="incomplete: 2 of 4"):
        StoreReader(half)
    assert StoreWriter(half, SCHEMA).done() == {0, 1}
    write(half, SCHEMA, [2, 3])
    assert not stray.exists()
    assert contents(half) == whole


@pytest.mark.parametrize("shard", [2, 3], ids=["whole shard", "last shard"])
def test_torn_shards_that_no_journal_names_are_written_anew(half: Path, whole: dict[str, bytes], shard: int) -> None:
    # after a power cut a renamed file may be empty or hold anything
    for k, file in enumerate(shard_files(half, shard)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes([b"", b"torn", bytes(1000)][k % 3])
    write(half, SCHEMA, [2, 3])
    assert contents(half) == whole


def test_a_shard_may_be_written_twice(half: Path, whole: dict[str, bytes]) -> None:
    write(half, SCHEMA, [1, 2, 3, 3])
    assert contents(half) == whole


@pytest.mark.parametrize(
    ("allowed", "code"),
    [(n, errno.ENOSPC) for n in (0, 1, ARRAYS // 2, ARRAYS - 1, ARRAYS)] + [(3, errno.EDQUOT)],
)
def test_a_full_disk(
    half: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, allowed: int, code: int
) -> None:
    before = contents(half)
    with monkeypatch.context() as patch:
        DiskFull(patch, allowed, code)
        with pytest.raises(NoSpaceError) as caught:
            write(half, SCHEMA, [2, 3])
    assert caught.value.exit_code == 5
    assert str(half) in str(caught.value)
    assert "free some space" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(half) == before  # shards 0 and 1 and nothing else: no data, no journal, no temporary file
    assert StoreWriter(half, SCHEMA).done() == {0, 1}
    write(half, SCHEMA, [2, 3])
    assert contents(half) == whole


def test_another_failure_is_not_called_a_full_disk(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        DiskFull(patch, 3, errno.EIO)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
            write(half, SCHEMA, [2])
    assert not isinstance(caught.value, KDError)
    assert StoreWriter(half, SCHEMA).done() == {0, 1}


@pytest.mark.parametrize("allowed", [0, 5])
def test_a_full_disk_while_creating_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    with monkeypatch.context() as patch:
        DiskFull(patch, allowed)
        with pytest.raises(NoSpaceError):
            create(tmp_path / "s", SCHEMA)
    assert list(tmp_path.iterdir()) == []


def test_the_journal_is_written_after_the_data(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []

    def spy(path: Path, data: bytes) -> None:
        if path.parent.name == "journal":
            found.append(all(f.stat().st_size > 0 for f in shard_files(half, 2)))
        files.atomic_write_bytes(path, data)

    monkeypatch.setattr(places, "atomic_write_bytes", spy)
    write(half, SCHEMA, [2])
    assert found == [True]


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Call ``act`` when the ``number``-th array of a group is to be created."""
    real, seen = zarr.Group.create_array, [0]

    def create_array(self: Any, *args: Any, **more: Any) -> Any:
        seen[0] += 1
        if seen[0] == number:
            act()
        return real(self, *args, **more)

    monkeypatch.setattr(zarr.Group, "create_array", create_array)


@pytest.mark.parametrize("number", [1, 4, ARRAYS + 1])
def test_creation_that_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        stop_at(patch, number, interrupt)
        with pytest.raises(KeyboardInterrupt):
            create(tmp_path / "s", SCHEMA)
    assert list(tmp_path.iterdir()) == []
    create(tmp_path / "s", SCHEMA)
    assert read_manifest(tmp_path / "s").schema == SCHEMA


KILL = """
import os, sys, zarr
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.support.store_case import create, make_schema
real, seen = zarr.Group.create_array, []
def create_array(self, *args, **more):
    seen.append(1)
    if len(seen) == 4:
        os.kill(os.getpid(), 9)
    return real(self, *args, **more)
zarr.Group.create_array = create_array
create(Path(sys.argv[2]), make_schema())
"""


def test_a_kill_while_creating_leaves_no_store(tmp_path: Path) -> None:
    here = str(Path(__file__).parents[2])
    store = tmp_path / "s"
    done = subprocess.run([sys.executable, "-c", KILL, here, str(store)], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not store.exists()
    with pytest.raises(MissingPathError):
        StoreReader(store)
    leftovers = [p.name for p in tmp_path.iterdir()]
    assert leftovers == [".s.creating"]
    make_store(store, SCHEMA)  # the same command again
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert_row_equal(StoreReader(store).read(keys()[3]), make_row(SCHEMA, 3))


def test_a_store_in_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    create(tmp_path / "a" / "b" / "s", SCHEMA)
    assert read_manifest(tmp_path / "a" / "b" / "s") == make_manifest(SCHEMA)


def test_creation_does_not_touch_a_store_that_is_there(half: Path) -> None:
    before = contents(half)
    with pytest.raises(OSError, match="not empty"):
        create_store(half, make_manifest(SCHEMA), IMAGE_IDS[::-1].copy())
    assert contents(half) == before
    assert [p.name for p in half.parent.iterdir()] == [half.name]


def test_a_finished_store_can_be_moved(half: Path, tmp_path: Path) -> None:
    write(half, SCHEMA, [2, 3])
    moved = Path(shutil.move(half, tmp_path / "elsewhere"))
    for index in np.arange(0, SCHEMA.rows, SHARD_ROWS):
        assert_row_equal(StoreReader(moved).read(keys()[index]), make_row(SCHEMA, int(index)))
