"""Options of the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--golden DIR``: check the reference numbers of another folder."""
    default = Path(__file__).parent / "golden" / "cases"
    parser.addoption("--golden", type=Path, default=default, help="folder of reference *.npz files to check")
