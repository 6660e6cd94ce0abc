"""The ``kdcli`` command: parses, calls one engine function, reports. Errors become one line and an exit code here.

Nothing heavy is imported at module level, so that ``kdcli --help`` answers at once.
"""

from __future__ import annotations

import os
import sys

import typer

from kdcli.errors import KDError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil object detectors from a teacher that runs once.\n\n"
    "The usual order: train (a teacher), cache-teacher, distill (students), compare. `kdcli methods` lists the "
    "distillation methods, `kdcli models` the detectors.\n\nExample: kdcli demo --out demo",
)


def main() -> None:
    """Entry point; exits with 0, 2 usage, 3 data or option, 4 store, 5 space, 6 gate, 130 interrupted."""
    # GNU OpenMP spins at barriers by default: with one other busy process on the machine a training step took 20 times
    # longer on two cores. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    sys.exit(run(arguments, debug=debug))


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Run one command line and return its exit code. ``debug`` lets exceptions through with their traceback."""
    from kdcli.cli import commands  # noqa: F401  registers the commands on ``app``

    try:
        result = app(arguments, standalone_mode=False, prog_name="kdcli")
        return result if isinstance(result, int) else 0
    except typer.TyperException as error:
        return _fail(error.format_message(), error.exit_code)
    except typer.Abort:
        return _fail("interrupted", 130)
    except KeyboardInterrupt:
        return _fail("interrupted; what is finished is kept: train and distill go on with --resume, cache-teacher with "
                     "the same command", 130)  # fmt: skip
    except KDError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # the reader of our output went away (`kdcli ... | head`): not an error of ours
        sys.stderr.close()
        return 0


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
