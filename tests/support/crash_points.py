"""Every moment at which a command can be killed, one after another: not a sample of them.

What a process leaves on the disk changes with a few system calls alone: a file opened for writing, synced, renamed or
deleted, a folder made or deleted. A command runs once in a forked child that counts those under a folder, then once for
each of them on a fresh copy, dying right before it. A synced file dies with half of its bytes too, a file opened for
writing empty.

``python -m tests.support.crash_points SPEC.json`` is the process that forks: it has imported everything and has no threads.
"""

from __future__ import annotations

import builtins
import importlib
import io
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import kdcli
from kdcli.digest import digest_of
from tests.support.attack import tiny
from tests.support.files import contents

DIED = 137
WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """``commands`` run one after another in the folder ``start``, where ``{}`` in an argument is the folder.

    ``again``: what a person runs after a kill; the same commands where it is empty. ``ignore``: files below the folder that
    tell the time. ``stable``: the folder is byte for byte the uninterrupted one afterwards; else only its names are.
    """

    start: str
    commands: tuple[tuple[str, ...], ...]
    again: tuple[tuple[str, ...], ...] = ()
    verify: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    stable: bool = True
    codes: tuple[int, ...] = (0,)  # of the commands that are run again
    most: int = 10**9  # points: see ``chosen``


@dataclass(frozen=True)
class Finding:
    """What was wrong after a death at ``point``."""

    point: int
    event: str
    problem: str


def explore(scenario: Scenario, scratch: Path) -> tuple[int, list[Finding]]:
    """The number of crash points that were tried, and what was wrong, from a process of its own."""
    spec = scratch / "spec.json"
    spec.write_text(json.dumps({"scenario": asdict(scenario), "scratch": str(scratch)}))
    command = [sys.executable, "-m", "tests.support.crash_points", str(spec)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    return found["points"], [Finding(**f) for f in found["findings"]]


class _Points:
    """Counts the events under ``folder``; at event ``last`` the process dies."""

    def __init__(self, folder: Path, last: int | None, log: Path) -> None:
        self.folder, self.last, self.log = os.path.realpath(folder), last, log
        self.owner, self.count = os.getpid(), 0

    def hit(self, name: str, path: Any, halve: str | None = None) -> None:
        """One event; ``halve``: a file that is cut in half at a point of its own, before."""
        if os.getpid() != self.owner or not self._ours(path):
            return
        if halve is not None:
            self._point(f"half {name}", path, halve)
        self._point(name, path, None)

    def _point(self, name: str, path: Any, halve: str | None) -> None:
        if self.count == self.last:
            if halve is not None:
                os.truncate(halve, os.path.getsize(halve) // 2)
            os._exit(DIED)
        if self.last is None:
            with _REAL["open"](self.log, "a") as log:
                log.write(f"{name} {os.path.relpath(os.path.realpath(str(path)), self.folder)}\n")
        self.count += 1

    def _ours(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.realpath(path).startswith(self.folder + os.sep)


_REAL: dict[str, Any] = {"open": builtins.open}


def _install(points: _Points) -> None:
    """Replace the calls by ones that count first."""

    def where(path: Any, folder: int | None) -> Any:
        """``path`` with the folder of its descriptor before it: rmtree deletes by names relative to one."""
        return path if folder is None else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fspath(path))

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            points.hit(name, where(path, kwargs.get("dir_fd", kwargs.get("src_dir_fd"))))
            return real(path, *args, **kwargs)

        return call

    for name in ("unlink", "remove", "rename", "replace", "mkdir", "rmdir", "link", "symlink", "truncate"):
        setattr(os, name, counted(name, getattr(os, name)))
    real_sync, real_open, real_os_open = os.fsync, builtins.open, os.open

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")
        points.hit("fsync", path, path if os.path.isfile(path) else None)
        real_sync(descriptor)

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax+"):
            return real_open(path, mode, *args, **kwargs)
        points.hit("open", path)
        file = real_open(path, mode, *args, **kwargs)
        points.hit("opened", path)
        return file

    def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & WRITE:
            points.hit("os.open", where(path, kwargs.get("dir_fd")))
        descriptor: int = real_os_open(path, flags, *args, **kwargs)
        if flags & WRITE:
            points.hit("os.opened", where(path, kwargs.get("dir_fd")))
        return descriptor

    os.fsync, builtins.open, io.open, os.open = fsync, opened, opened, os_open  # type: ignore[assignment]


def _run(commands: list[list[str]], folder: Path, points: _Points | None, output: Path) -> int:
    """The exit code of the last command that ran, in a forked child; DIED where it was killed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        sink = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        if points is not None:
            points.owner = os.getpid()
            _install(points)
        run = importlib.import_module("kdcli.cli.main").run
        for command in commands:
            code = run([argument.replace("{}", str(folder)) for argument in command])
            if code:
                break
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        code = 99
    os._exit(code)


@contextmanager
def _copy_of(start: Path, target: Path) -> Iterator[Path]:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(start, target, symlinks=True)
    try:
        yield target
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _state(folder: Path, scenario: Scenario) -> dict[str, str]:
    folders = {f"{f.relative_to(folder)}/": "" for f in folder.rglob("*") if f.is_dir()}
    files = contents(folder)
    for name in files:
        if name.endswith(".pt"):  # what it holds: pickle spells one object that is named twice otherwise than two
            files[name] = digest_of(torch.load(folder / name, weights_only=True))
        if not scenario.stable or any(Path(name).match(pattern) for pattern in scenario.ignore):
            files[name] = ""
    return {**folders, **files}


def _compared(found: dict[str, str], wanted: dict[str, str]) -> str:
    left = sorted(found.keys() - wanted.keys())
    gone = sorted(wanted.keys() - found.keys())
    other = sorted(n for n in found.keys() & wanted.keys() if found[n] != wanted[n])
    parts = [("left behind", left), ("missing", gone), ("other bytes", other)]
    return "; ".join(f"{what}: {', '.join(names[:4])}" for what, names in parts if names)


def kind_of(event: str) -> str:
    """A call, the folder at the top, and a file's own name without its numbers."""
    call, _, path = event.rpartition(" ")
    name = re.sub(r"[0-9a-f]{8}-[0-9]+|[0-9]+", "N", path.split("/")[-1])
    return f"{call} {path.split('/')[0]} {name if '.' in name else 'folder'}"


def chosen(events: Sequence[str], most: int) -> list[int]:
    """All of ``events`` if they are at most ``most``; else the first of each kind, or ``most`` evenly spaced of these."""
    if len(events) <= most:
        return list(range(len(events)))
    first: dict[str, int] = {}
    for number, event in enumerate(events):
        first.setdefault(kind_of(event), number)
    kinds = sorted(first.values())
    step = max(1.0, len(kinds) / most)
    return sorted({kinds[int(n * step)] for n in range(min(most, len(kinds)))} | {kinds[-1]})


def _explore(scenario: Scenario, scratch: Path) -> dict[str, Any]:
    start, place = Path(scenario.start), scratch / "w"  # one place for all: a path may be written into a file
    log, output = scratch / "events.txt", scratch / "output.txt"
    commands = [list(c) for c in scenario.commands]
    again = [list(c) for c in scenario.again] or commands
    verify = [list(scenario.verify)] if scenario.verify else []
    with _copy_of(start, place):
        code = _run(commands, place, _Points(place, None, log), output)
        assert code == 0, f"uninterrupted: {code}, {output.read_text()[-2000:]}"
        wanted = _state(place, scenario)
    events = log.read_text().splitlines()
    findings, reached = [], 0
    points = chosen(events, scenario.most)
    for point in points:
        with _copy_of(start, place):
            code = _run(commands, place, _Points(place, point, log), output)
            if code != DIED:  # zarr-python's threads make a folder once or twice, so the last point may not be reached
                assert code == 0, f"{events[point]}: {code}, {output.read_text()[-300:]}"
                continue
            reached += 1
            code = _run(again, place, None, output)
            if code not in scenario.codes:
                findings.append(Finding(point, events[point], f"again: {code}, {output.read_text()[-300:]}"))
                continue
            if difference := _compared(_state(place, scenario), wanted):
                findings.append(Finding(point, events[point], difference))
            elif verify and _run(verify, place, None, output):
                findings.append(Finding(point, events[point], f"verify: {output.read_text()[-300:]}"))
    return {"points": reached, "findings": [asdict(f) for f in findings]}


def main() -> None:
    """Read the file of a scenario and print what was found."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    table = spec["scenario"]
    lists = {name: tuple(tuple(words) for words in table[name]) for name in ("commands", "again")}
    scenario = Scenario(
        start=table["start"], **lists, verify=tuple(table["verify"]), ignore=tuple(table["ignore"]),
        stable=table["stable"], codes=tuple(table["codes"]), most=table["most"],
    )  # fmt: skip
    for module in pkgutil.walk_packages(
        kdcli.__path__, "kdcli."
    ):  # before the forks: each child would take a second for it
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    tiny.install()
    print(json.dumps(_explore(scenario, Path(spec["scratch"]))))


if __name__ == "__main__":
    main()
