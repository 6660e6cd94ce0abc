"""Two processes with the same global batch train as one: every loss term of every step, in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.small_runs import make_teacher

ROOT = Path(__file__).parents[3]
STEPS = 3
CANVAS = "64x96"
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


Options = dict[str, dict[str, Any]]
PROPOSALS = {"obj_cls_weight": 2.0, "bg_cls_weight": 2.0}
# detector, methods, their options
CASES: tuple[tuple[str, str, Options], ...] = (
    ("gfl", "ld,rm,pfi,bckd,defeat,drkd,cwd,pkd,fgd", {"pkd": {"weight": 1e-3}, "defeat": {"backbone_weight": 1.0}}),
    ("gfl", "ld,defeat_thin,drkd_lite", {"ld": {"imitation": "gi"}}),
    ("faster_rcnn", "defeat", {"defeat": PROPOSALS}),
    ("retinanet", "rm,bckd", {}),
    ("retinanet+distribution", "ld", {"ld": {"imitation": "fine_grained", "joint": True}}),
    ("atss", "rm,bckd", {}),
    ("atss+distribution", "ld", {"ld": {"imitation": "fine_grained"}}),
    ("fcos", "rm,bckd", {}),
    ("fcos+distribution", "ld", {"ld": {"imitation": "fine_grained"}}),
)


def case(folder: Path, detector: str, methods: str, options: Options) -> dict[str, Any]:
    """Options of a run with a live teacher, which is made in ``folder``."""
    name, _, box = detector.partition("+")
    teacher = make_teacher(folder / f"{detector}.pt", detector=detector)
    model = {"bn": "train", "name": f"{name}_shufflenet_v2_x0_5", "head_channels": 32, "box": box or "default"}
    sides = {"teacher": str(teacher), "canvas": CANVAS, "model": model}
    return {"epochs": 4, "method": methods, "methods": options, **sides}


@pytest.mark.full
def test_one_and_two_processes_give_the_same_losses(shapes: Path, tmp_path: Path) -> None:
    cases = [case(tmp_path, *one) for one in CASES]
    alone, together = run(shapes, cases, 1), run(shapes, cases, 2)
    for name, one, two in zip(CASES, alone, together, strict=True):
        assert len(one) == len(two) == STEPS
        for step, (a, b) in enumerate(zip(one, two, strict=True)):
            assert a.keys() == b.keys()
            for term, value in a.items():
                assert b[term] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), (name, step, term)
        terms = [n for n in one[0] if not n.startswith("loss")]
        assert all(any(step[n] != 0 for step in two) for n in terms), f"a term of {name} is 0 under DDP"
        assert one[0] != one[-1]
