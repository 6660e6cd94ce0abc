"""The ``kdcli`` command: parses, calls one engine function, reports. Errors become one line and an exit code here.

Nothing heavy is imported at module level, so that ``kdcli --help`` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from typing import TextIO

import typer

from kdcli.cli import cache, cache_edit, cache_teacher, compare, convert, data, demo, evaluate, listing, train
from kdcli.cli.app import app
from kdcli.errors import KDError, NoSpaceError, OptionError
from kdcli.shown import one_line

# importing them registers their commands
COMMANDS = (cache, cache_edit, cache_teacher, compare, convert, data, demo, evaluate, listing, train)

INTERRUPTED = (
    "interrupted; what is finished is kept: train and distill go on with --resume RUN, cache-teacher with the "
    "same command"
)

_ELSEWHERE = "; choose another place"
_UNKNOWN = "; look at the disk or file system that it is on, or choose another place"
FIXES = {  # what helps against an OSError that nothing below here has turned into a message
    errno.ENOTDIR: _ELSEWHERE,
    errno.EEXIST: _ELSEWHERE,
    errno.EISDIR: _ELSEWHERE,
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: "; change its permissions or choose another place",
    errno.EPERM: "; change its permissions or choose another place",
    errno.ENOENT: "; see whether the path is right",
    errno.EFBIG: "; a file may not grow that large here: raise the limit (ulimit -f), or choose another place",
    errno.EMFILE: "; raise the limit on open files (ulimit -n)",
    errno.EAGAIN: "; the limit on processes (ulimit -u) or memory (ulimit -v) is reached: lower --workers and --threads",
}
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)
MEMORY = "; lower --batch, --micro-batch, --workers or --canvas, or raise the limit on memory (ulimit -v)"
# what PyTorch, the dynamic linker and Python's threads say when there is no memory: RuntimeErrors and an ImportError
OUT_OF_MEMORY = (
    "can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory", "bad_alloc",
    "could not create a primitive", "could not create a memory object",
)  # fmt: skip
NO_MAPPING = ("failed to map segment", "cannot apply additional memory protection")
NO_THREAD = ("can't start new thread", "thread constructor failed", "resource temporarily unavailable")
# of which an empty value would be taken for the current folder, or as if the flag were not there; others are refused below
NOT_EMPTY = frozenset(
    {
        *(
            "--out",
            "--html",
            "--plots",
            "--config",
            "--resume",
            "--init-from",
            "--data",
            "--cache",
            "--teacher",
            "--baseline",
        ),
        *("--canvas", "--device", "--amp", "--method", "--view", "--prefix"),
    }
)
PIPE_CLOSED = 141  # 128 + SIGPIPE: what a shell shows of a program that such a write ended


def main() -> None:
    """Entry point; its exit codes are those of docs/cli.md."""
    # GNU OpenMP spins at barriers: with one other busy process on two cores a training step took 13.5 s instead of 0.21.
    # Spinning for a short while only costs nothing when the machine is free and 3.1 s when it is not (asleep at once:
    # 0.32 and 2.9). Must be set before torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if None in (sys.stdin, sys.stdout, sys.stderr):  # started with one of them closed
        from kdcli.report.lasting import open_standard_streams

        open_standard_streams()
    warnings.showwarning = show_warning
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    sys.exit(flushed(run(arguments, debug=debug)))


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Run one command line and return its exit code. ``debug`` lets exceptions through with their traceback."""
    for before, argument in zip(["kdcli", *arguments], arguments, strict=False):
        flag = argument.removesuffix("=") if argument.endswith("=") else before if not argument else ""
        if flag in NOT_EMPTY:
            return _fail(f"there is nothing after {flag}: is a variable of the shell not set?", 2)
    try:
        result = app(arguments, standalone_mode=False, prog_name="kdcli", obj=arguments)
        code = result if isinstance(result, int) else 0
        return _fail(INTERRUPTED, 130) if code == 130 else code  # typer turns Ctrl-C into an exit code
    except typer.TyperException as error:
        return _fail(" ".join(error.format_message().split()), error.exit_code)
    except typer.Abort:
        return _fail(INTERRUPTED, 130)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, 130)
    except KDError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        return PIPE_CLOSED  # the reader of our output went away (`kdcli ... | head`): not an error of ours
    except SystemExit as error:  # typer and rich make that of a closed pipe
        if isinstance(error.__context__, BrokenPipeError):
            return PIPE_CLOSED
        raise
    except OSError as error:
        if debug:
            raise
        return _fail(*_of_the_system(error))
    except (MemoryError, RuntimeError, ImportError) as error:
        found = _of_the_limits(error)
        if debug or found is None:
            raise
        return _fail(*found)


def flushed(code: int) -> int:
    """``code``, or that of a closed pipe, once what was printed is on its way: Python's own attempt, at exit, would say so."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (BrokenPipeError, ValueError):  # ValueError: closed already
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
            code = code or PIPE_CLOSED
    return code


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """A Python warning as one line; Python's own two name the file and line of code that gave it."""
    print(one_line(f"warning: {' '.join(str(message).split())}"), file=file or sys.stderr)


def _of_the_system(error: OSError) -> tuple[str, int]:
    """Message and exit code of an OSError that nothing below has turned into a message."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "; free some space or choose another place" if full else FIXES.get(error.errno or 0, _UNKNOWN)
    fix = MEMORY if error.errno == errno.ENOMEM else fix
    return f"{error.filename or 'a file'}: {error.strerror or error}{fix}", _code(error.errno in NO_SPACE)


def _of_the_limits(error: Exception) -> tuple[str, int] | None:
    """Message and exit code of what memory or threads were not enough for; None for any other error, which is a bug."""
    text = " ".join(str(error).split())
    low = text.lower()
    if isinstance(error, RecursionError):
        return None
    if isinstance(error, MemoryError) or any(words in low for words in (*OUT_OF_MEMORY, *NO_MAPPING)):
        return f"there is not enough memory ({text[:150] or 'MemoryError'}){MEMORY}", _code(True)
    if any(words in low for words in NO_THREAD):
        return f"no thread can be started ({text[:150]}){FIXES[errno.EAGAIN]}", _code(True)
    return None


def _code(space: bool) -> int:
    return NoSpaceError.exit_code if space else OptionError.exit_code


def _fail(message: str, code: int) -> int:
    from kdcli.report.lasting import LastingStream

    print(one_line(f"error: {message}"), file=LastingStream(sys.stderr))  # without a reader the code tells it
    return code
