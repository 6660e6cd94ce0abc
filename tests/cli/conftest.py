"""The data set, teacher and stores of the engine's tests."""

from __future__ import annotations

from tests.engine.conftest import default_store, lossless_store, shapes, teacher

__all__ = ["default_store", "lossless_store", "shapes", "teacher"]
