"""How long work reports what it does: the engine calls, the command line draws, tests stay silent."""

from __future__ import annotations

from typing import Protocol


class ProgressReporter(Protocol):
    """Something that may be looking."""

    def stage(self, label: str, total: int) -> None:
        """A new stage of ``total`` units begins."""
        ...

    def advance(self, units: int = 1, info: str = "") -> None:
        """``units`` more are done; ``info`` is a short state, e.g. the loss."""
        ...

    def message(self, text: str) -> None:
        """A line to keep: a warning, or the result of an epoch."""
        ...


class NullReporter:
    """Nobody is looking."""

    def stage(self, label: str, total: int) -> None:
        """Ignored."""

    def advance(self, units: int = 1, info: str = "") -> None:
        """Ignored."""

    def message(self, text: str) -> None:
        """Ignored."""
