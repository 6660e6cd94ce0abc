"""KL divergence with a temperature, as LD and its class distillation use it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def kl_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of each row, times T^2, averaged over the row's bins (not summed).

    ``student``, ``teacher``: logits [..., m]. Returns [...]. The teacher gets no gradient. LD (arXiv 2102.12252)
    divides by the number of bins: 17 for an edge, K for classes.
    """
    log_p = F.log_softmax(teacher.detach() / temperature, dim=-1)
    log_q = F.log_softmax(student / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).mean(dim=-1) * temperature**2
