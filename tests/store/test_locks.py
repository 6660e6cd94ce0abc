"""Who may write a store at the same time."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from kdcli.errors import StoreError
from kdcli.store.locks import NO_LOCKS, lock_file, lock_store, remove_stale_locks


@pytest.mark.parametrize(("first", "second"), [(False, False), (False, True), (True, False)])
def test_a_sole_writer_goes_with_nobody(tmp_path: Path, first: bool, second: bool) -> None:
    with (
        lock_store(tmp_path, shared=first),
        pytest.raises(StoreError, match="is being written by another process"),
        lock_store(tmp_path, shared=second),
    ):
        pass
    with lock_store(tmp_path, shared=second):
        assert tmp_path.is_dir()


def test_parts_write_side_by_side(tmp_path: Path) -> None:
    with lock_store(tmp_path, shared=True), lock_store(tmp_path, shared=True):
        assert tmp_path.is_dir()


def test_a_held_file_is_waited_for_and_gone_afterwards(tmp_path: Path) -> None:
    file, inside, most = tmp_path / ".lock", [0], [0]
    count = threading.Lock()

    def work() -> None:
        for _ in range(50):
            with lock_file(file):
                with count:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                with count:
                    inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_holder_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".000001.lock").touch()
    (tmp_path / "000001.json").touch()
    with lock_file(tmp_path / ".000002.lock"):
        remove_stale_locks(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [".000002.lock", "000001.json"]


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def use_locks(folder: Path) -> None:
    with lock_store(folder, shared=False):
        remove_stale_locks(folder)
        with lock_file(folder / ".lock"):
            assert [p.name for p in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("number", NO_LOCKS)
def test_one_writer_needs_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    without_locks(monkeypatch, number)
    (tmp_path / ".000001.lock").touch()
    with pytest.warns(UserWarning, match=f"'{tmp_path}' has no file locks.*run one alone"):
        use_locks(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_several_writers_need_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch, errno.ENOLCK)
    with (
        pytest.raises(StoreError, match=f"'{tmp_path}' has no file locks.*without --shard"),
        lock_store(tmp_path, shared=True),
    ):
        pass


def test_another_error_of_a_lock_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error") as told, lock_store(tmp_path, shared=False):
        pass
    assert told.value.filename == str(tmp_path)
