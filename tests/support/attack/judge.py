"""What may not happen, whatever the input: a traceback, a hang, an error that is no line, a file that was left behind."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import stat
from pathlib import Path

from tests.support.attack.child import Outcome

CODES = frozenset({0, 2, 3, 4, 5, 6})  # of README.md; 1 is a bug
LONGEST = 400  # characters of an error
MOST = 2**30  # bytes of memory: the commands need 0.1 GB here
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
LEFT = re.compile(r"^\..+|.*\.(tmp|lock|creating|making)$")
WHOLE = ("config.toml", "zarr.json", "shapes.json")  # of an output that the same command, or --resume, goes on with

Files = dict[str, str]


def snapshot(folder: Path) -> Files:
    """What each path below ``folder`` is: the sha256 of a file, the target of a link, else its kind."""
    found: Files = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent) / name
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
            elif stat.S_ISLNK(mode):
                found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
            else:
                found[str(path.relative_to(folder))] = f"kind {stat.S_IFMT(mode):o}"
    return found


def leftovers(files: Files, before: Files) -> list[str]:
    """Temporary files among ``files`` that were not there before."""
    return sorted(f for f in files if f not in before and LEFT.match(Path(f).name))


def errors(err: str) -> list[str]:
    """The lines of stderr that say what was wrong."""
    return [line for line in err.splitlines() if line.startswith("error:")]


def problems_of(outcome: Outcome) -> list[str]:
    """What is wrong with the way in which a command ended, apart from whether it should have succeeded."""
    found = []
    if outcome.code == -signal.SIGALRM:
        return ["hang"]
    if outcome.code < 0:
        return [f"crash: {signal.Signals(-outcome.code).name}"]
    if "Traceback (most recent call last)" in outcome.err:
        found.append("traceback")
    elif outcome.code not in CODES:
        found.append(f"exit code {outcome.code}")
    elif outcome.code:
        lines = errors(outcome.err)
        if len(lines) != 1 and outcome.code != 3:  # `data check` has its faults instead
            found.append(f"{len(lines)} error lines")
        if any(len(line) > LONGEST for line in lines):
            found.append("long error")
    if CONTROL.search(outcome.err) or CONTROL.search(outcome.out):
        found.append("control characters")
    if outcome.grown > MOST:
        found.append("memory")
    return found


def unfinished(out: Path) -> list[str]:
    """Outputs of a command that failed which nothing goes on with and nobody asked for."""
    left = []
    for path in sorted(out.iterdir()):
        if path.is_dir() and (not any(path.iterdir()) or any((path / name).is_file() for name in WHOLE)):
            continue
        if path.is_dir() and all(p.suffix == ".png" for p in path.iterdir()):
            continue  # drawings of the images before the one that could not be read
        left.append(path.name)
    return left


def signature(outcome: Outcome, problem: str) -> str:
    """What tells one root cause from another: the last line of our code in a traceback, and the error."""
    if problem != "traceback":
        return problem
    lines = outcome.err.splitlines()
    ours = [line.strip() for line in lines if line.startswith("  File ") and "/kdcli/" in line and "tests" not in line]
    where = re.sub(r'File ".*/(kdcli/[^"]*)", line (\d+), in (\S+).*', r"\1:\2 \3", ours[-1]) if ours else "?"
    last = next((line for line in reversed(lines) if line and not line.startswith((" ", "error:", "warning:"))), "")
    return f"traceback {where}: {last.partition(':')[0]}"
