"""One command line in a forked child with a limit on time and memory: what it said and how it ended.

Forked from a process that has imported everything, a command costs no start: it takes the milliseconds of its work.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 60  # a command of these takes 2 s at most, on a busy machine 6
IDLE = 5.0  # seconds without any work: it waits for something that does not come
MEMORY = 5 * 2**30  # of address space; the process that is forked has 3.6


@dataclass(frozen=True)
class Outcome:
    """How a command ended. code: its exit code, or minus the signal that killed it."""

    code: int
    out: str
    err: str
    seconds: float
    grown: int  # bytes of peak resident memory above the parent's


def warm() -> None:
    """Import what the commands import, on one thread, and leave no thread behind that a fork would lose."""
    import torch

    importlib.import_module("kdcli.cli.main")
    torch.set_num_threads(1)


def warm_as(lines: list[list[str]], folder: Path) -> None:
    """Import what these command lines, which must succeed, import when they run in a child."""

    def work() -> int:
        code = 0
        for line in lines:
            code = code or command(line)
        print("\n" + json.dumps(sorted(sys.modules)))
        return code

    out, err = folder / "stdout", folder / "stderr"
    found = wait(fork(work, out, err), out, err, time.monotonic())
    assert found.code == 0, found.err
    for name in json.loads(found.out.rstrip().rpartition("\n")[2]):
        if name not in sys.modules and name != "__main__":
            with contextlib.suppress(ImportError):  # a name that a package made up
                importlib.import_module(name)
    gc.collect()
    gc.freeze()


def fork(work: Callable[[], int], out: Path, err: Path, *, memory: int = MEMORY, seconds: int = SECONDS) -> int:
    """Start ``work`` in a child that leads a process group; its pid. Its exit code is what ``work`` returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    for output in (out, err):
        output.write_bytes(b"")  # a kill may come before the child makes them
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setsid()
        for number, file in ((0, os.devnull), (1, str(out)), (2, str(err))):
            opened = os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, number)
            os.close(opened)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        code = work()
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def command(arguments: list[str]) -> int:
    """What ``kdcli`` with these arguments does, as its entry point does it; the exit code."""
    from kdcli.cli.main import main

    sys.argv = ["kdcli", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def wait(pid: int, out: Path, err: Path, started: float) -> Outcome:
    """Wait for the child and end what is left of its group; one that does nothing for ``IDLE`` seconds ends as by an alarm."""
    worked, since = -1, time.monotonic()
    pause = 0.001
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            break
        time.sleep(pause)
        pause = min(0.02, pause * 1.3)
        state, spent = _work(pid)
        if spent != worked or state != "S":
            worked, since = spent, time.monotonic()
        elif time.monotonic() - since > IDLE:
            os.kill(pid, signal.SIGALRM)
            since = time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Outcome(
        code=os.waitstatus_to_exitcode(status),
        out=out.read_text("utf-8", "replace"),
        err=err.read_text("utf-8", "replace"),
        seconds=time.monotonic() - started,
        grown=max(0, usage.ru_maxrss - mine) * 1024,
    )


def _work(pid: int) -> tuple[str, int]:
    """The state of a process and the ticks that all its threads have worked."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "Z", 0
    return fields[0], int(fields[11]) + int(fields[12])


def run(arguments: list[str], folder: Path, place: Path | None = None) -> Outcome:
    """Run one command line in the folder ``place``; what it prints goes through files in ``folder``."""
    out, err = folder / "stdout", folder / "stderr"
    started = time.monotonic()

    def work() -> int:
        os.chdir(place or folder)
        tempfile.tempdir = None  # the parent may have looked for one
        return command(arguments)

    return wait(fork(work, out, err), out, err, started)
