"""What a process that only infers asks of the C library."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdcli.engine.runtime import memory
from tests.support.selection import matrix

FAULTS = """
import resource
import numpy as np
import torch
from kdcli.engine.runtime.memory import keep_freed_memory
keep_freed_memory(torch.device("{device}"))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    np.ones(2**26, np.uint8)
before = faults()
for _ in range(4):
    np.ones(2**26, np.uint8)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("device", matrix(["cpu", "cuda"]))
def test_freed_memory_is_kept_on_a_cpu(device: str) -> None:
    script = FAULTS.format(device=device)
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    # 64 MB are 16,384 pages of 4 kB, or 32 of 2 MB where the system gives such
    assert (int(ran.stdout) < 16) == (device == "cpu")


def test_a_system_that_keeps_no_peak_in_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmRSS:\t100 kB\n")
    monkeypatch.setattr(memory, "STATUS", status)
    assert memory.peak_memory_bytes(torch.device("cpu")) > 2**20
