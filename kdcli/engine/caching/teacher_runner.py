"""The teacher of a store at work: where it runs, who loads for it, and what it gives for samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcli.engine.loading.samples import Sample, collate
from kdcli.engine.teacher.forward import TeacherForward
from kdcli.store.schema import row_tensor
from kdcli.tensors import Need


@dataclass(frozen=True)
class TeacherRunner:
    """A frozen teacher on its device, and the data workers in front of it."""

    forward: TeacherForward
    device: torch.device
    workers: int  # data workers; 0: images are loaded in this process

    @property
    def interleaved(self) -> bool:
        """Whether loading and encoding go between the passes of the teacher, not beside them."""
        return self.device.type == "cpu" and self.workers == 0

    @property
    def exact(self) -> TeacherRunner:
        """The same teacher in float32."""
        return replace(self, forward=replace(self.forward, precision="fp32"))

    def rows(
        self, samples: Sequence[Sample], needs: Sequence[Need], proposals: Sequence[Tensor] | None = None
    ) -> list[dict[str, NDArray[np.float32]]]:
        """Teacher tensors (float32, by ``Need.key``) of samples of one orientation. ``proposals``: see TeacherForward.rows."""
        if not needs:  # cached images alone are added to a store
            return [{} for _ in samples]
        batch = collate(samples, None).to(self.device)
        return [
            {need.key: row_tensor(row[need.key][0] if need.dense else row[need.key]) for need in needs}
            for row in self.forward.rows(batch.images, batch.targets, batch.entries, needs, proposals)
        ]
