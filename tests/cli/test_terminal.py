"""What reaches a terminal: no escape sequence of a name, no markup, lines that end; and a reader that goes away."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcli.cli import main
from kdcli.cli.main import PIPE_CLOSED, run
from tests.support.command_line import refused

EVIL = "a\x1b]0;title\x07\x1b[2J\x9b2J\u202e[red]b[/red]:smile:"
SHOWN = r"a\x1b]0;title\x07\x1b[2J\x9b2J\u202e[red]b[/red]:smile:"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
MakeRun = Callable[..., Path]


def _data(folder: Path, name: str) -> Path:
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        document = {
            "images": [{"id": 1, "file_name": f"{name}.png", "width": 64, "height": 64}],
            "annotations": [], "categories": [{"id": 1, "name": name}],
        }  # fmt: skip
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(document))
    return folder


def test_names_in_errors_and_reports(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = _data(tmp_path / "data", EVIL)
    assert run(["data", "check", str(data)]) == 3
    out, err = capsys.readouterr()
    assert SHOWN in err
    assert not CONTROL.search(out + err)
    assert run(["data", "check", str(data), "--json"]) == 3
    out, _ = capsys.readouterr()
    assert not CONTROL.search(out)
    assert json.loads(out)["train"]["faults"]
    line = refused(capsys, 3, "data", "check", tmp_path / EVIL)
    assert SHOWN in line
    line = refused(capsys, 2, "train", "--epochs", EVIL)
    assert not CONTROL.search(line)
    line = refused(capsys, 3, "compare", tmp_path / "a\nerror: b")
    assert r"a\nerror: b" in line


def test_json_has_no_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    from kdcli.cli.json_output import print_json

    value = {"name": EVIL + "\x7f"}
    print_json(value)
    out = capsys.readouterr().out
    assert not CONTROL.search(out)
    assert json.loads(out) == value


@pytest.mark.parametrize("text", ["x" * 3_000_000, "x y " * 700_000])
def test_a_value_of_megabytes_is_cut(capsys: pytest.CaptureFixture[str], text: str) -> None:
    for arguments in (
        ["train", "--data", "d", "--model", "m", "--out", "o", "--set", text],
        ["train", "--data", "d", "--model", "m", "--out", "o", "--set", f"optim.lr={text}"],
        ["methods", "--canvas", text],
        ["train", "--epochs", text],
    ):
        assert len(refused(capsys, 2 if "--epochs" in arguments else 3, *arguments)) < 2_100


@pytest.mark.parametrize("command", ["version", "models", "models --json", "--help", "train --help"])
@pytest.mark.full
def test_a_reader_that_goes_away(command: str) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [sys.executable, "-m", "kdcli", *command.split()], stdout=theirs, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(theirs)
    assert done.returncode in (0, PIPE_CLOSED)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "error" not in done.stderr


def test_a_closed_pipe_is_141(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    for command in (["version"], ["models", "--json"], ["methods", "--json"]):
        assert run(command) == PIPE_CLOSED


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), 5, "not enough memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            5,
            "ulimit -v",
        ),
        (RuntimeError("could not create a primitive"), 5, "not enough memory"),
        (RuntimeError("can't start new thread"), 5, "--threads"),
        (ImportError("libtorch.so: failed to map segment from shared object"), 5, "not enough memory"),
        (OSError(12, "Cannot allocate memory"), 5, "--batch"),
        (OSError(27, "File too large", "/a"), 5, "ulimit -f"),
        (OSError(24, "Too many open files", "/a"), 3, "ulimit -n"),
    ],
)
def test_limits_are_met_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str
) -> None:  # fmt: skip
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(main, "app", fail)
    assert words in refused(capsys, code, "version")


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), RuntimeError(), RecursionError("too deep"), ImportError("no")]
)
def test_a_bug_stays_a_bug(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(type(error)):
        run(["version"])


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2, of 2"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE = 'two'"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE = 0"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE = '-1'"),
        ({"WORLD_SIZE": "", "RANK": ""}, "WORLD_SIZE = ''"),
        ({"WORLD_SIZE": "9" * 5000, "RANK": "0"}, "WORLD_SIZE = '999"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "MASTER_PORT = 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}, "MASTER_PORT = 99999"),
    ],
)
def test_variables_that_are_not_of_torchrun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], words: str
) -> None:  # fmt: skip
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = ["train", "--data", tmp_path, "--model", "gfl_resnet18", "--out", tmp_path / "out"]
    assert words in refused(capsys, 3, *line)
    if not words.startswith("MASTER"):  # cache-teacher shares the work without meeting
        store = ["cache-teacher", "--data", tmp_path, "--teacher", "t", "--method", "ld", "--out", tmp_path / "out"]
        assert words in refused(capsys, 3, *store)
    assert not (tmp_path / "out").exists()
