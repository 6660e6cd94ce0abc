"""Draws what the engine reports: progress bars on stderr when it is a terminal, plain lines otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from kdcli.engine.runtime.progress import NullReporter, ProgressReporter
from kdcli.report.console import human_console, say
from kdcli.report.lasting import lasting_stderr
from kdcli.report.text import plain


class ConsoleReporter:
    """A ProgressReporter for people. Use as a context manager, so that the bar is gone at the end.

    Until then nothing that happens to stderr ends the work: see lasting.py.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or human_console()
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(
            *columns, TimeRemainingColumn(), TextColumn("{task.fields[info]}", markup=False),
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._stderr = ExitStack()

    def __enter__(self) -> ConsoleReporter:
        self._stderr.enter_context(lasting_stderr())
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
        self._stderr.close()

    def stage(self, label: str, total: int) -> None:
        """A new bar in place of the last."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(plain(label), total=total, info="")

    def advance(self, units: int = 1, info: str = "") -> None:
        """Move the bar."""
        if self._task is not None:
            if info:
                self._bar.update(self._task, info=plain(info))
            self._bar.advance(self._task, units)

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        say(self.console, text)


@contextmanager
def reporting(loud: bool) -> Iterator[ProgressReporter]:
    """A ConsoleReporter, or a silent one in the processes that only compute."""
    if loud:
        with ConsoleReporter() as reporter:
            yield reporter
    else:
        with lasting_stderr():  # for warnings
            yield NullReporter()
