"""Options of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# data set, teacher and stores of the tests that write with a real teacher
pytest_plugins = ("tests.support.small_runs",)


@pytest.fixture(scope="session", autouse=True)
def _own_index_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Parsed annotations of the tests stay out of the user's cache folder; subprocesses inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCLI_CACHE", str(tmp_path_factory.mktemp("index")))
        yield


# the same examples in each run: a landing must not depend on luck; HYPOTHESIS_PROFILE=search looks for new ones
settings.register_profile("steady", derandomize=True)
settings.register_profile("search", max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--golden DIR``: check the reference numbers of another folder."""
    default = Path(__file__).parent / "golden" / "cases"
    parser.addoption("--golden", type=Path, default=default, help="folder of reference *.npz files to check")
