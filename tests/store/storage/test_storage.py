"""What a folder and an object store are asked for alike, without asking whether it is the one or the other."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from kdcli.errors import OptionError, StoreError
from kdcli.store.storage.base import Storage
from kdcli.store.storage.local import LocalStorage
from kdcli.store.storage.object_store import ObjectStorage
from kdcli.store.storage.resolve import open_storage

REMOTE = "s3://bucket/store"


def test_where_a_store_is() -> None:
    assert open_storage(Path("a/store")).folder == Path("a/store")
    assert open_storage(REMOTE).folder is None
    assert str(open_storage(REMOTE)) == REMOTE


def test_only_a_folder_is_changed_in_place(tmp_path: Path) -> None:
    assert open_storage(tmp_path).local_folder("prune it") == tmp_path
    with pytest.raises(OptionError, match=r"copy the store to a disk first, prune it there, and copy it back"):
        open_storage(REMOTE).local_folder("prune it")


def test_free_space_is_that_of_the_disk(tmp_path: Path) -> None:
    there, not_yet = LocalStorage(tmp_path).free_bytes(), LocalStorage(tmp_path / "a" / "b").free_bytes()
    assert there is not None
    assert not_yet is not None
    assert there > 0
    assert abs(there - not_yet) < 2**30  # others write too
    assert ObjectStorage(REMOTE).free_bytes() is None


def test_a_disk_that_does_not_say_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(folder: Path) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented", str(folder))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert LocalStorage(tmp_path).free_bytes() is None


def test_a_read_that_fails_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    storage = LocalStorage(tmp_path)
    (file,) = storage.open_all(["a"], 1)
    assert file is not None

    def pread(descriptor: int, length: int, start: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(OSError, match="Input/output error") as told:
        storage.read_ranges([(file, 0, 1)])
    assert told.value.filename == str(tmp_path / "a")


def test_below_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is there needs no lock beside it; one that is to be made says where it could be."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "zarr.json").write_text("{}")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with LocalStorage(tmp_path / "store").lock_creation():
        assert [p.name for p in tmp_path.iterdir()] == ["store"]
    with (
        pytest.raises(OptionError, match=f"nothing can be written to '{tmp_path}'"),
        LocalStorage(tmp_path / "b").lock_creation(),
    ):
        pass


def test_an_object_store_holds_nothing_and_nobody() -> None:
    storage = ObjectStorage(REMOTE)
    with storage.lock(shared=False), storage.lock(shared=False), storage.lock_creation(), storage.lock_file("a"):
        storage.remove_stale_locks("journal")


def test_a_folder_that_is_filled_appears_whole(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "deep" / "store")

    def fill(folder: Path) -> None:
        folder.mkdir()
        (folder / "a").write_text("a")
        assert not storage.exists()

    assert storage.create_store(fill)
    assert storage.read("a") == b"a"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["store"]
    with pytest.raises(OSError, match="not empty"):
        storage.create_store(fill_again)
    assert storage.read("a") == b"a"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["store"]


def fill_again(folder: Path) -> None:
    folder.mkdir()
    (folder / "b").write_text("b")


def hold(storage: Storage, ready: Path) -> None:
    with storage.lock(shared=True), storage.lock_file("journal/.000001.lock"), storage.lock_creation():
        ready.touch()
        time.sleep(600)


def test_locks_end_with_a_killed_process(tmp_path: Path) -> None:
    storage, ready = LocalStorage(tmp_path / "store"), tmp_path / "ready"
    (tmp_path / "store" / "journal").mkdir(parents=True)
    process = multiprocessing.get_context("fork").Process(target=hold, args=(storage, ready))
    process.start()
    assert process.pid is not None
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(StoreError, match="is being written by another process"), storage.lock(shared=False):
        pass
    with storage.lock(shared=True):
        storage.remove_stale_locks("journal")  # held
    assert (tmp_path / "store" / "journal" / ".000001.lock").exists()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    storage.remove_stale_locks("journal")
    assert list((tmp_path / "store" / "journal").iterdir()) == []
    with storage.lock(shared=False), storage.lock_creation():
        assert (tmp_path / ".store.lock").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ready", "store"]
