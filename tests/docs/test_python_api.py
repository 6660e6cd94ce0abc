"""The script that docs/python-api.md is, run from top to bottom on drawn images."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import kdcli

PAGE = (Path(__file__).parents[2] / "docs" / "python-api.md").read_text()
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.full
def test_the_page_runs(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(shapes, tmp_path / "DATA")
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(PAGE)
    assert len(blocks) == 7
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(block, scope)
    assert scope["pixels"].shape[0] == 3
    assert scope["scores"]["ap"] == scope["metrics"]["ap"]
    assert scope["terms"]["pkd_loss"] > 0
    assert all(m.grad is not None for m in scope["maps"][:4])


def test_the_page_names_what_is_there() -> None:
    named = set(re.findall(r"\bkdcli\.(\w+)", PAGE)) - {"plugins"}
    assert named <= set(kdcli.__all__)
    functions = {name for name in kdcli.__all__ if name[0].islower()}
    assert functions <= named
