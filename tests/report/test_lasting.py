"""Output that goes away ends nothing: a closed pipe, a full disk, a terminal that is gone, streams closed at the start."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdcli.cli.main import run
from kdcli.report.lasting import LastingStream, lasting_stderr
from kdcli.report.progress import ConsoleReporter
from tests.support.command_line import STUDENT


class Failing(io.StringIO):
    """Raises the errors in turn, then takes what is written."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.numbers = list(numbers)

    def write(self, text: str) -> int:
        if self.numbers:
            raise OSError(self.numbers.pop(0), "no")
        return super().write(text)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EBADF, errno.EFBIG])
def test_what_comes_after_a_failure_is_dropped(number: int) -> None:
    stream = Failing(number)
    lasting = LastingStream(stream)
    for text in ("a", "b"):
        assert lasting.write(text) == 1
        lasting.flush()
    assert stream.getvalue() == ""


def test_a_slow_reader_loses_what_it_did_not_take() -> None:
    stream = Failing(errno.EAGAIN)
    lasting = LastingStream(stream)
    lasting.write("a")
    lasting.write("b")
    assert stream.getvalue() == "b"


@pytest.mark.parametrize("gone", ["pipe", "disk"])
def test_a_reporter_outlives_its_stream(monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    if gone == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    stream = open(writer, "w", buffering=1)  # noqa: SIM115 - closed below, with an error
    monkeypatch.setattr(sys, "stderr", stream)
    with ConsoleReporter() as reporter:
        reporter.stage("epoch 1", 3)
        reporter.message("a line")
        print("a warning", file=sys.stderr, flush=True)
        reporter.message("another")
    assert sys.stderr is stream
    with pytest.raises(OSError, match=r"Broken pipe|No space left"):  # it was gone
        print("more", file=sys.stderr, flush=True)
    with pytest.raises(OSError, match=r"Broken pipe|No space left"):
        stream.close()


def test_the_block_alone_is_protected(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Failing()
    monkeypatch.setattr(sys, "stderr", stream)
    with lasting_stderr():
        print("inside", file=sys.stderr)
    assert sys.stderr is stream
    assert stream.getvalue() == "inside\n"


def shell(line: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", "-c", line, "sh", sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_error_keeps_its_exit_code_without_a_reader() -> None:
    code = "import sys; from kdcli.cli.main import main; sys.argv[1:] = ['data', 'check', '/nowhere']; main()"
    with_reader = shell('exec "$@"', code)
    assert with_reader.stderr.startswith("error: ")
    for line in ('exec "$@" 2>/dev/full', 'exec "$@" 2>&-', 'exec "$@" <&- >&- 2>&-'):
        assert shell(line, code).returncode == with_reader.returncode != 0


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "import sys; from kdcli.report.lasting import open_standard_streams as o; o(); f = open(sys.argv[1], 'w')\n"
        "f.write(str(f.fileno())); print('x', file=sys.stderr); print('y')"
    )
    done = shell('exec "$@" <&- >&- 2>&-', code, str(tmp_path / "file"))
    assert done.returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.full
def test_a_training_outlives_its_log(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w", buffering=1))  # noqa: SIM115
    assert run(["train", "--data", str(shapes), *STUDENT, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "metrics.json").is_file()
    with pytest.raises(OSError, match="No space left"):
        sys.stderr.close()
