"""One training step as a module: student forward, detection loss, distillation terms.

One module, because under DDP everything trainable (adapters too) must be synchronised by the same wrapper.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdcli.detectors.base import Detector
from kdcli.detectors.read import read, sample_proposals
from kdcli.methods.base import Method, student_needs_of
from kdcli.structures import Batch
from kdcli.tensors import BACKBONE, Region, Tensors, precise


class TrainStep(nn.Module):
    """The student and its methods; ``forward`` returns every weighted loss term."""

    def __init__(self, student: Detector, methods: Mapping[str, Method], amp_dtype: torch.dtype | None,
        channels_last: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.student = student
        self.methods = nn.ModuleDict(dict(methods))
        self.amp_dtype = amp_dtype
        # the images stay as they are: normalised plane by plane they take half the time, and a convolution follows its weights
        self.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        self.student_needs = student_needs_of(methods.values())

    def forward(self, batch: Batch, teacher: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(detection terms, distillation terms) of a batch, each a scalar. The losses are computed in float32."""
        # the student's own precision: float32, or float64 where a test compares sums
        images = batch.images.to(next(self.student.parameters()).dtype).div_(255)
        with torch.autocast(images.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            outputs = self.student(images)
        # backbone stages are 60 MB an image at 800x1344: copied to float32 only where a method reads them
        read_names = {need.name for need in self.student_needs}
        outputs = {n: precise(value) for n, value in outputs.items() if n not in BACKBONE or n in read_names}
        detection = self.student.loss(outputs, batch.targets)
        distillation: dict[str, Tensor] = {}
        proposals = None
        if any(n.region == Region.PROPOSALS for n in self.student_needs):
            teacher, proposals = sample_proposals(self.student, teacher, batch.targets)
        student = read(self.student, outputs, self.student_needs, batch.entries, batch.targets, proposals)
        for name, method in self.methods.items():
            distillation.update({f"{name}_{part}": term for part, term in method(student, teacher, batch).items()})
        return detection, distillation

    def owner(self, term: str) -> tuple[str, Method, str]:
        """Name, method and part of ``term``, which is called ``<name>_<part>``."""
        names = [n for n in self.methods if term.startswith(f"{n}_")]
        name = max(names, key=len)
        method = self.methods[name]
        assert isinstance(method, Method)
        return name, method, term[len(name) + 1 :]

    def active(self, term: str, batch: Batch) -> bool:
        """Whether ``term`` can differ from 0 on ``batch``."""
        _, method, part = self.owner(term)
        return method.active(batch, part)

    def weight_option(self, term: str) -> str:
        """``--set`` key that scales ``term``."""
        name, method, part = self.owner(term)
        return f"{name}.{method.weight_option(part)}"
