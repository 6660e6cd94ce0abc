"""Helper processes end with the process that they help: it may be killed alone, by a scheduler or for memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

LOOK_S = 0.5  # how often a process asks whether its parent is still there


def end_with(gone: Callable[[], object]) -> None:
    """End this process, at once and whatever it does, when ``gone``, which waits in a thread, returns."""

    def watch() -> None:
        gone()
        end_now()

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def end_now() -> None:
    """End this helper process, without what Python does at an end: what is told would not be heard."""
    os._exit(1)


def parent_gone(parent: int) -> None:
    """Wait until ``parent`` is no longer the parent of this process, which the system then gives another one."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
