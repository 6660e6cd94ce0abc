"""Files are whole or absent, and a full disk is an error of its own."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from kdcli.errors import MissingPathError, NoSpaceError, OptionError
from kdcli.files import (
    NO_REPLACE,
    NO_SYNC,
    atomic_save,
    atomic_write_bytes,
    atomic_write_text,
    load_torch,
    remove_leftovers,
    require_beside,
)


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.txt", "old")
    atomic_write_text(tmp_path / "a.txt", "größer\n")
    atomic_write_bytes(tmp_path / "b.bin", b"\x00\xff")
    assert (tmp_path / "a.txt").read_bytes() == "größer\n".encode()
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\xff"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.bin"]


def test_saved_tensors_come_back(tmp_path: Path) -> None:
    atomic_save({"w": torch.arange(5.0), "n": [1, "x"]}, tmp_path / "a.pt")
    back = load_torch(tmp_path / "a.pt", what="state")
    assert torch.equal(back["w"], torch.arange(5.0))
    assert back["n"] == [1, "x"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_keeps_the_old_file(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write_text(tmp_path / "a.txt", "old")

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpaceError, match=r"a\.txt: the disk is full"):
        atomic_save({"w": torch.zeros(9)}, tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        atomic_write_text(tmp_path / "nowhere" / "a.txt", "x")
    assert not isinstance(caught.value, MissingPathError)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("made-by-a-pickle",)


def test_foreign_files_are_refused_and_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(_Evil()))
    torch.save({"x": _Evil()}, tmp_path / "evil2.pt")
    torch.save({"w": torch.zeros(1000)}, tmp_path / "torn.pt")
    data = (tmp_path / "torn.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("evil.pt", "evil2.pt", "torn.pt", "empty.pt"):
        with pytest.raises(OptionError, match=rf"teacher '.*{name}': not a PyTorch file") as caught:
            load_torch(tmp_path / name, what="teacher")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "made-by-a-pickle").exists()
    with pytest.raises(MissingPathError, match=r"teacher '.*gone.pt': no such file"):
        load_torch(tmp_path / "gone.pt", what="teacher")


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / ".last.pt.123.tmp").write_bytes(b"half")
    (tmp_path / "weights" / "last.pt").write_bytes(b"whole")
    remove_leftovers(tmp_path)
    assert [f.name for f in (tmp_path / "weights").iterdir()] == ["last.pt"]


@pytest.mark.parametrize("number", NO_SYNC)
def test_a_file_system_that_cannot_sync_is_written_to(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_write_text(tmp_path / "a.txt", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_that_cannot_be_opened_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, flags: int) -> int:  # what a folder without the right to list it does
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    atomic_write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_disk_that_fails_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error") as told:
        atomic_write_text(tmp_path / "a.txt", "new")
    assert told.value.filename == str(tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", NO_REPLACE)
def test_a_file_system_that_cannot_replace_is_refused(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OptionError, match=rf"a\.txt: the file system of '{tmp_path}' cannot rename .* another disk"):
        atomic_write_text(tmp_path / "a.txt", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_place_in_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_beside(tmp_path / "run")
    require_beside(tmp_path / "new" / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(OptionError, match=f"nothing can be written to '{tmp_path}'"):
        require_beside(tmp_path / "run")
