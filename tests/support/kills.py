"""The command in a process of its own, which is killed at a moment of the test's choice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable


def kdcli(*arguments: str) -> subprocess.Popen[bytes]:
    """Start the command in a process group of its own, so that its data workers are killed with it."""
    return subprocess.Popen(
        [sys.executable, "-m", "kdcli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a clean end."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def kill_when(process: subprocess.Popen[bytes], reached: Callable[[], bool], delay: float) -> None:
    """kill -9 the whole group ``delay`` seconds after ``reached`` comes true, which has to be before its end.

    Progress triggers it, not a clock: on a busy machine a share of a measured time lands anywhere, or nowhere.
    """
    deadline = time.monotonic() + 300
    while not reached():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.002)
    time.sleep(delay)
    assert process.poll() is None, "it ended before the kill"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
