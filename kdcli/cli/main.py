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
from kdcli.errors import KDError

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
    errno.EMFILE: "; raise `ulimit -n`",
    errno.ENOENT: "; see whether the path is right",
}


def main() -> None:
    """Entry point; exits with 0, 2 usage, 3 data or option, 4 store, 5 space, 6 gate, 7 helper process, 130 interrupted."""
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
    sys.exit(run(arguments, debug=debug))


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Run one command line and return its exit code. ``debug`` lets exceptions through with their traceback."""
    try:
        result = app(arguments, standalone_mode=False, prog_name="kdcli", obj=arguments)
        code = result if isinstance(result, int) else 0
        return _fail(INTERRUPTED, 130) if code == 130 else code  # typer turns Ctrl-C into an exit code
    except typer.TyperException as error:
        return _fail(error.format_message(), error.exit_code)
    except typer.Abort:
        return _fail(INTERRUPTED, 130)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, 130)
    except KDError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # the reader of our output went away (`kdcli ... | head`): not an error of ours
        sys.stderr.close()
        return 0
    except OSError as error:
        if debug:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "; free some space or choose another place" if full else FIXES.get(error.errno or 0, _UNKNOWN)
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}{fix}", 5 if full else 3)


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """A Python warning as one line; Python's own two name the file and line of code that gave it."""
    print(f"warning: {' '.join(str(message).split())}", file=file or sys.stderr)


def _fail(message: str, code: int) -> int:
    from kdcli.report.lasting import LastingStream

    print(f"error: {' '.join(message.split())}", file=LastingStream(sys.stderr))  # without a reader the code tells it
    return code
