"""Neck maps made by hand, for DeFeat and its thinned form."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcli.methods.base import Method
from kdcli.methods.defeat_thin import ROWS
from kdcli.methods.maps import MAPS
from kdcli.structures import Batch
from kdcli.tensors import Tensors
from tests.support.method_case import CANVAS, NONE, ONE, TWO, detector_of, many_boxes, take
from tests.support.process_case import on_two_processes

GFL = detector_of("gfl")
SIZES = [h * w for h, w in GFL.grid.level_shapes(CANVAS)]
SCENE = [TWO, NONE, ONE, many_boxes(9)]


def maps(images: int, channels: int, seed: int) -> Tensor:
    """[B, P, C]."""
    return torch.randn(images, sum(SIZES), channels, generator=torch.Generator().manual_seed(seed))


def data(batch: Batch, teacher_channels: int = 32) -> tuple[Tensors, Tensors]:
    """Whole maps of both nets; the student's is a leaf."""
    images = len(batch.keys)
    ours, theirs = maps(images, 32, 1).requires_grad_(), maps(images, teacher_channels, 2)
    return {MAPS.key: ours}, {MAPS.key: theirs}


def warm(method: Method) -> None:
    """Give its adapters weights that do something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.normal_(std=0.1, generator=generator)


def halved(method: Method, ours: Tensors, theirs: Tensors, batch: Batch) -> dict[str, Tensor]:
    """The terms of two processes, images 0, 1 and 2, 3."""
    entries = batch.entries
    assert entries is not None

    def half(order: list[int]) -> dict[str, Tensor]:
        student = {k: v[order] for k, v in ours.items()}
        mine = torch.isin(entries.image[entries.select("object+sample")], torch.tensor(order))
        teacher = {k: v[mine] if k == ROWS.key else v[order] for k, v in theirs.items()}
        result: dict[str, Tensor] = method(student, teacher, take(batch, order))
        return result

    return on_two_processes(lambda: half([0, 1]), lambda: half([2, 3]))
