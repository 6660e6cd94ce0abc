"""Output that may go away while the work goes on: the terminal closes, the reader of a pipe ends, the log's disk is full."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

STANDARD = (0, 1, 2)


class LastingStream:
    """``stream`` for as long as it takes what is written; what comes after the first failure is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of any text stream, but nothing is raised for a failure of the system's."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """As ``write``."""
        self._try(self._stream.flush)

    def _try(self, work: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            work()
        except BlockingIOError:  # a reader that is slow, not gone
            return
        except OSError:
            self._gone = True
            _silence(self._stream)


def _silence(stream: TextIO) -> None:
    """Lead a standard stream to the null device: libraries write to it too, and Python what it still holds, at its end."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # no file of the system's
        return
    if number in STANDARD:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


@contextmanager
def lasting_stderr() -> Iterator[None]:
    """For the time of the block: nobody has to read what is reported."""
    before = sys.stderr
    sys.stderr = cast(TextIO, LastingStream(before))
    try:
        yield
    finally:
        sys.stderr = before


def open_standard_streams() -> None:
    """Give a process that was started with one of them closed the null device: a file of ours would get its number.

    A library's message would then be written into a store or a checkpoint.
    """
    for number in STANDARD:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
