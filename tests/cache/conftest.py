"""The data set and teacher of the engine's tests, for the stores that are written with a real one."""

from __future__ import annotations

from tests.engine.conftest import shapes, teacher

__all__ = ["shapes", "teacher"]
