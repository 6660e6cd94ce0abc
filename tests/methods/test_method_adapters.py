"""What a method trains beside the student: adapters where the channels differ, and modules of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdcli.detectors.base import Detector
from kdcli.methods.defeat_thin import ROWS
from kdcli.structures import Batch
from kdcli.tensors import FEATURES, GT_ROIS
from tests.support.method_case import (
    CANVAS,
    EVERY,
    ONE,
    STUDENT,
    TEACHER,
    TWO,
    both_sides,
    build,
    class_of,
    detector_of,
    every,
    make_batch,
    make_outputs,
    on_gfl,
    pair_of,
    resolved,
    total,
)
from tests.support.selection import matrix

PARAMETERS = {"drkd", "drkd_lite", "defeat", "defeat_thin", "fgd"}  # whatever the channels


@every
def test_other_channels_get_an_adapter_that_learns(name: str, detector: str) -> None:
    torch.manual_seed(0)
    student, teacher = detector_of(detector, 64), detector_of(detector, backbone="mobilenet_v3_small")
    method = class_of(name)(pair_of(student, teacher), **resolved(name, detector))
    if name == "fgd":  # its context blocks start at 0: no gradient would get past them
        for parameter in method.parameters():
            nn.init.normal_(parameter, std=0.1)
    batch = make_batch(student, [TWO, ONE])
    outputs = make_outputs(student, 2, STUDENT), make_outputs(teacher, 2, TEACHER)
    terms = method(*both_sides(method, student, outputs[0], teacher, outputs[1], batch), batch)
    parameters = dict(method.named_parameters())
    assert bool(parameters) == any(n.name in (FEATURES, GT_ROIS) for n in method.needs)
    total(terms).backward()
    idle = without_gradient(name, student, batch)
    for key, parameter in parameters.items():
        assert parameter.grad is not None, key  # under DDP none may go unused
        assert bool(parameter.grad.any()) != key.startswith(idle), key


def without_gradient(name: str, student: Detector, batch: Batch) -> tuple[str, ...]:
    """How the parameters are called that this batch cannot teach anything.

    DeFeat's thinned form: on the levels that have neither a foreground cell nor a sampled one. FGD: its pooling, a
    softmax over cells, where a level has one valid cell.
    """
    assert batch.entries is not None
    sizes = [h * w for h, w in student.grid.level_shapes(CANVAS)]
    if name == "defeat_thin":
        cells = batch.entries.index[batch.entries.select(ROWS.region)] // student.grid.num_anchors
        rows = torch.bucketize(cells, torch.tensor(sizes).cumsum(0), right=True).bincount(minlength=len(sizes))
        return tuple(f"adapters.{k}." for k, count in enumerate(rows.tolist()) if count == 0)
    if name == "fgd":
        valid = batch.targets.valid.split(sizes, dim=1)
        single = [k for k, level in enumerate(valid) if level.sum(dim=1).max() == 1]
        return tuple(f"{side}.{k}.pool." for k in single for side in ("student", "teacher"))
    return ()


@pytest.mark.parametrize(
    ("name", "detector"), matrix([case for case in EVERY if case[0].partition(":")[0] not in PARAMETERS], on_gfl)
)
def test_equal_channels_need_no_adapter(name: str, detector: str) -> None:
    assert list(build(name, detector).parameters()) == []
    assert list(build(name, detector).buffers()) == []
