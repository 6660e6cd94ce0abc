"""Output that may go away while the work goes on: the terminal closes, the reader of a pipe ends, the log's disk is full."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

STANDARD = (0, 1, 2)


class LastingStream:
    """``stream`` for as long as it takes what is written; what comes after the first failure goes to the null device."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of any text stream, but nothing is raised for a failure of the system's."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """As ``write``."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if isinstance(error, BlockingIOError):  # a reader that is slow, not gone
            return
        try:
            number = self._stream.fileno()
        except (OSError, ValueError):  # no file of the system's
            number = -1
        if number in STANDARD:  # for libraries that write to it themselves, and for what this stream still holds
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)
        else:
            self._stream = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives


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
