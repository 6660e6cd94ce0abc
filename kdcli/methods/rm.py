"""RM: Rank Mimicking, of "Knowledge Distillation for Object Detection via Rank Mimicking and Prediction-guided Feature
Imitation" (AAAI 2022, arXiv 2112.04840).

The positives of one ground-truth box are ranked by the teacher; the student learns the ranking, as a softmax over the
candidates' scores, and again over their IoUs. It reads two numbers per positive. There is no official code; what the
paper leaves open follows the re-implementations, as docs/methods/rm_pfi.md tells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcli.methods.base import Method, Pair
from kdcli.methods.maps import mean_images
from kdcli.structures import Batch
from kdcli.tensors import RANK, Need, Region, Tensors

RANKS = Need(RANK, Region.MAIN)


class RM(Method):
    """Classification and localisation ranks over each box's positives.

    Options: ``weight``; ``cls`` and ``loc`` scale the two parts (0 switches one off); ``temperature`` of the softmax;
    ``sorted_scores`` compares the sorted scores, as one re-implementation does (it forgets which anchor has which).
    """

    title = "Rank Mimicking, AAAI 2022, arXiv 2112.04840"
    evidence = "paper's abstract, re-implementations; no sorting and one weight for all detectors are ours"
    offline = "exact"
    needs = (RANKS,)

    def __init__(
        self,
        pair: Pair,
        *,
        weight: float = 4.0,
        cls: float = 1.0,
        loc: float = 1.0,
        temperature: float = 1.0,
        sorted_scores: bool = False,
    ) -> None:
        super().__init__()
        self.weight, self.cls, self.loc = weight, cls, loc
        self.temperature, self.sorted_scores = temperature, sorted_scores

    def forward(self, student: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
        """``cls`` and ``loc``, without those whose weight is 0."""
        entries = batch.entries
        assert entries is not None
        main = entries.select(Region.MAIN)
        image, gt = entries.image[main], entries.gt[main]
        boxes = torch.tensor([len(b) for b in batch.targets.boxes], device=gt.device)
        first = boxes.cumsum(0) - boxes
        group = first[image] + gt  # one group per ground-truth box of the batch
        # mean over an image's boxes, then over images; an image without boxes adds 0 and counts
        images = mean_images(batch)
        share = (1.0 / (boxes.clamp(min=1) * images)).repeat_interleave(boxes)
        terms = {}
        for column, (name, factor) in enumerate((("cls", self.cls), ("loc", self.loc))):
            if not factor * self.weight:
                continue
            loss = rank_loss(
                student[RANKS.key][:, column] / self.temperature,
                teacher[RANKS.key][:, column] / self.temperature,
                group,
                len(share),
                sort=self.sorted_scores,
            )
            terms[name] = self.weight * factor * (loss * share).sum()
        return terms

    def active(self, batch: Batch, part: str) -> bool:
        """A ranking needs two positives of one box."""
        assert batch.entries is not None
        main = batch.entries.select(Region.MAIN)
        box = batch.entries.image[main] * (1 << 32) + batch.entries.gt[main]
        return bool((torch.unique(box, return_counts=True)[1] > 1).any())


def rank_loss(student: Tensor, teacher: Tensor, group: Tensor, num_groups: int, *, sort: bool = False) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) within each group of candidates.

    ``student``, ``teacher``: scores [M]; ``group``: [M], 0..num_groups-1. Returns [num_groups]; a group of fewer than
    two candidates gives 0 (a softmax over one is constant). Scores are probabilities or IoUs, in [0, 1]: exp is safe.
    """
    teacher = teacher.detach()
    if sort:
        student, teacher = _sorted_within(student, group), _sorted_within(teacher, group)
        group = group.sort().values
    log_p = teacher - _logsumexp(teacher, group, num_groups)[group]
    log_q = student - _logsumexp(student, group, num_groups)[group]
    return student.new_zeros(num_groups).index_add(0, group, log_p.exp() * (log_p - log_q))


def _logsumexp(score: Tensor, group: Tensor, num_groups: int) -> Tensor:
    peak = score.detach().new_full((num_groups,), -torch.inf)
    peak = peak.scatter_reduce(0, group, score.detach(), "amax")
    peak = torch.where(peak.isinf(), torch.zeros_like(peak), peak)
    total = score.new_zeros(num_groups).index_add(0, group, (score - peak[group]).exp())
    # empty groups are never gathered; 1 keeps their logarithm, and its gradient, finite
    return torch.where(total > 0, total, torch.ones_like(total)).log() + peak


def _sorted_within(score: Tensor, group: Tensor) -> Tensor:
    order = score.argsort()
    order = order[group[order].argsort(stable=True)]
    return score[order]
