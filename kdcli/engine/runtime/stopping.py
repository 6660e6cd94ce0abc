"""Asked to end: by a scheduler (SIGTERM), or because the terminal went away (SIGHUP, which ``nohup`` ignores)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kdcli.errors import KDError
from kdcli.tensors import world_size

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(KDError):
    """The system asked this process to end. The exit code is that of a process which the signal ended."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(
            f"stopped by {name}; what is finished is kept, and an unfinished run goes on with --resume RUN"
        )
        self.exit_code = 128 + number


_held = False
_asked = 0


@contextmanager
def stop_is_an_error() -> Iterator[None]:
    """For the time of the block, in the main thread: SIGTERM and SIGHUP raise Stopped, unless they are ignored.

    Not with several processes: one that waits for the others would not hear of it until they end.
    """
    global _asked
    _asked = 0
    before = {number: signal.getsignal(number) for number in SIGNALS} if world_size() == 1 else {}
    mine = [number for number, handler in before.items() if handler is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def held() -> Iterator[None]:
    """What the block does is done whole: Stopped is raised behind it."""
    global _held, _asked
    _held = True
    try:
        yield
    finally:
        _held = False
    if _asked:
        number, _asked = _asked, 0
        raise Stopped(number)


def _stop(number: int, frame: Any) -> None:
    global _asked
    if not _held:
        raise Stopped(number)
    _asked = number
