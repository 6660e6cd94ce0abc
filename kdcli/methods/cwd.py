"""CWD: Channel-wise Knowledge Distillation for Dense Prediction (ICCV 2021, arXiv 2011.13256).

Each channel of a neck map is turned into a distribution over the places of the image, and the student's is pulled to the
teacher's by KL divergence: it learns where a channel is active, not how strongly. Numbers of the detection setting are
mmrazor's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.methods.base import Method, Pair
from kdcli.methods.maps import MAPS, MASKED, channels, make_adapter, mean_images
from kdcli.structures import Batch
from kdcli.tensors import Tensors, precise


class CWD(Method):
    """Channel-wise divergence of the neck maps, on all levels.

    Options: ``weight``; ``temperature`` of the softmax over the cells of an image. When the channels differ, a 1x1
    convolution without bias (the softmax would not see one), shared by the levels, maps the student's to the teacher's.
    """

    title = "Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021, arXiv 2011.13256"
    evidence = "paper's abstract, mmrazor's code and detection settings; masking padding is ours"
    offline = "exact, dense"
    needs = (MAPS,)
    reads_targets = False
    index_aligned = False

    def __init__(self, pair: Pair, *, weight: float = 10.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.grid, self.weight, self.temperature = pair.grid, weight, temperature
        self.adapter = make_adapter(*channels(pair))

    def forward(self, student: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
        """``loss``, unless its weight is 0."""
        if not self.weight:
            return {}
        ours, theirs, valid = (
            self.grid.split_levels(v, batch.targets.canvas)
            for v in (
                precise(self.adapter(precise(student[MAPS.key]))),
                precise(teacher[MAPS.key]),
                batch.targets.valid,
            )
        )
        levels = [
            channel_divergence(s, t, v, self.temperature).sum() for s, t, v in zip(ours, theirs, valid, strict=True)
        ]
        return {"loss": self.weight * torch.stack(levels).sum() / mean_images(batch)}


def channel_divergence(student: Tensor, teacher: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """tau^2 * KL(teacher || student) over the valid cells, averaged over the channels, of each image: [B].

    ``student``, ``teacher``: maps of one level [B, cells, C]; ``valid``: [B, cells].
    """
    inside = valid[..., None]
    log_p = F.log_softmax((teacher.detach() / temperature).masked_fill(~inside, MASKED), dim=1)
    log_q = F.log_softmax((student / temperature).masked_fill(~inside, MASKED), dim=1)
    terms = torch.where(inside, log_p.exp() * (log_p - log_q), 0.0)
    return terms.sum(dim=1).mean(dim=1) * temperature**2
