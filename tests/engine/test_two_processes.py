"""Two processes with the same global batch train as one: every loss term of every step, in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import make_teacher

ROOT = Path(__file__).parents[2]
STEPS = 5
TOLERANCE = 1e-8


def run(shapes: Path, cases: list[dict[str, Any]], processes: int) -> list[list[dict[str, float]]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "tests.engine.trace_worker"]
    if processes > 1:
        command = [sys.executable, *launcher, "--module", "tests.engine.trace_worker"]
    found = subprocess.run(
        [*command, str(shapes), str(STEPS), json.dumps(cases)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    traces: list[list[dict[str, float]]] = json.loads(found.stdout.splitlines()[-1])
    return traces


def test_one_and_two_processes_give_the_same_losses(shapes: Path, tmp_path: Path) -> None:
    gfl = str(make_teacher(tmp_path / "gfl.pt"))
    faster = str(make_teacher(tmp_path / "faster.pt", detector="faster_rcnn"))
    common = {"epochs": 4, "model": {"bn": "train"}, "teacher": gfl}
    cases: list[dict[str, Any]] = [
        {**common, "method": "ld,rm,pfi,bckd,defeat,drkd,cwd,pkd,fgd", "methods": {"pkd": {"weight": 1e-3}}},
        {**common, "method": "ld,defeat_thin,drkd_lite", "methods": {"ld": {"imitation": "gi"}}},
        {
            **common,
            "teacher": faster,
            "method": "defeat",
            "methods": {"defeat": {"obj_cls_weight": 2.0, "bg_cls_weight": 2.0}},
            "model": {"bn": "train", "name": "faster_rcnn_shufflenet_v2_x0_5", "head_channels": 32},
        },
    ]
    alone, together = run(shapes, cases, 1), run(shapes, cases, 2)
    for case, one, two in zip(cases, alone, together, strict=True):
        assert len(one) == len(two) == STEPS
        for step, (a, b) in enumerate(zip(one, two, strict=True)):
            assert a.keys() == b.keys()
            for name, value in a.items():
                assert b[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), (case["method"], step, name)
        names = [n for n in one[0] if not n.startswith("loss")]
        assert all(any(step[n] != 0 for step in two) for n in names), "a term is 0 under DDP"
        assert one[0] != one[-1]
