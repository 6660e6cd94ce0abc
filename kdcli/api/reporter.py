"""What ``progress=`` means: nobody looks, a bar is drawn, or a reporter of the caller's is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kdcli.engine.runtime.progress import NullReporter, ProgressReporter
from kdcli.report.progress import reporting

Progress = ProgressReporter | bool | None


@contextmanager
def reporter_of(progress: Progress, first: bool = True) -> Iterator[ProgressReporter]:
    """The reporter that ``progress`` asks for; none but in the ``first`` of several processes."""
    if first and progress and not isinstance(progress, bool):
        yield progress
    elif first and progress:
        with reporting(True) as reporter:
            yield reporter
    else:
        yield NullReporter()
