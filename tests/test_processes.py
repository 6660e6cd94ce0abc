"""A helper process ends when the process that it helps does."""

from __future__ import annotations

import os
import signal
import time

from kdcli.processes import end_with, parent_gone


def test_a_helper_ends_with_its_parent() -> None:
    ours, theirs = os.pipe()
    parent = os.fork()
    if parent == 0:
        me = os.getpid()
        if os.fork() == 0:
            end_with(lambda: parent_gone(me))
            os.write(theirs, b"x")
        time.sleep(600)  # both have nothing else to do
        os._exit(1)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        assert pipe.read(1) == b"x"
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        assert pipe.read() == b""  # the helper held it too
