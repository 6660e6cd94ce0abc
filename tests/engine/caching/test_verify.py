"""``cache verify``: what is not what was written is found, headers of arrays included."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from kdcli.cli.main import run
from kdcli.engine.caching.verify import verify_checksums
from kdcli.engine.runtime.progress import NullReporter
from kdcli.errors import StoreError
from tests.support.selection import matrix


@pytest.mark.parametrize("tensor", matrix(["box_distribution@main+vlr", "features@all"]))
def test_flipped_bits_of_array_headers_are_found(tensor: str, default_store: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(default_store, store)
    verify_checksums(store, NullReporter())
    header = store / "tensors" / tensor / "values" / "zarr.json"
    data = header.read_bytes()
    draw = np.random.default_rng(0)
    for position in draw.integers(0, len(data), 60):
        changed = bytearray(data)
        changed[int(position)] ^= 1 << int(draw.integers(8))
        header.write_bytes(changed)
        with pytest.raises(StoreError, match=r"zarr\.json' is not what was written"):
            verify_checksums(store, NullReporter())
    header.write_bytes(data)
    verify_checksums(store, NullReporter())


def test_features_that_are_entropy_coded_are_what_was_written(default_store: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(default_store, store)
    header = store / "tensors" / "features@all" / "values" / "zarr.json"
    data = header.read_bytes()
    assert data.count(b'"level": -1') == 1
    header.write_bytes(data.replace(b'"level": -1', b'"level": 1'))  # as stores before 2026-11-21 say
    verify_checksums(store, NullReporter())
    for wrong in (b'"level":\r1', b'"level": 2', b'"level": -2'):
        header.write_bytes(data.replace(b'"level": -1', wrong))
        with pytest.raises(StoreError, match=r"zarr\.json' is not what was written"):
            verify_checksums(store, NullReporter())


def test_verify_finds_the_data_by_itself(
    default_store: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["cache", "verify", str(default_store), "--teacher", str(teacher), "--rows", "2"]) == 0
    assert "box_distribution@main+vlr: rms" in capsys.readouterr().err
