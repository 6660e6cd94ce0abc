"""DeFeat on a thinned background: an approximation of DeFeat (CVPR 2021, arXiv 2103.14475) with a sparse store.

All foreground cells are kept, and each background cell with probability ``keep``; what is kept of the background counts
1 / keep, so that the expected loss is DeFeat's. The choice is the same in every epoch, which is why this is a method of
its own and not an option.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdcli.geometry.defeat_mask import defeat_cells
from kdcli.methods.base import APPROXIMATION, Method, Pair
from kdcli.methods.decoupled import adapt, half_mean, neck_adapters
from kdcli.methods.divergence import squared_rows
from kdcli.methods.maps import MAPS
from kdcli.structures import Batch
from kdcli.tensors import FEATURES, Need, Region, Tensors

ROWS = Need(FEATURES, "object+sample")


class DeFeatThin(Method):
    """Imitation of neck features at all foreground cells and at a random share of the background.

    Options: ``fg_weight``, ``bg_weight``: as for defeat. ``keep``: probability with which a background cell is kept; it
    defines the region. The student's map is read whole, since the 3x3 adapters need the neighbours of a cell.
    """

    title = "DeFeat with a thinned background, an approximation of CVPR 2021, arXiv 2103.14475"
    evidence = "our decision: DeFeat on a fixed random share of the background cells"
    offline = APPROXIMATION
    needs = (ROWS,)
    student_needs = (MAPS,)
    region_options = ("keep",)

    def __init__(self, pair: Pair, *, fg_weight: float = 4.0, bg_weight: float = 16.0, keep: float = 0.1) -> None:
        super().__init__()
        self.grid = pair.grid
        self.fg_weight, self.bg_weight, self.keep = fg_weight, bg_weight, keep
        self.adapters = neck_adapters(pair)

    def forward(self, student: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
        """``object`` and ``background``, without those whose weight is 0."""
        entries, targets = batch.entries, batch.targets
        assert entries is not None
        shapes = self.grid.level_shapes(targets.canvas)
        sizes = [h * w for h, w in shapes]
        adapted = adapt(student[MAPS.key], self.adapters, shapes, targets.valid)
        chosen = entries.select(ROWS.region)
        cell = entries.index[chosen] // self.grid.num_anchors
        rows = adapted.flatten(0, 1).index_select(0, entries.image[chosen] * adapted.shape[1] + cell)
        error = squared_rows(rows, teacher[ROWS.key])  # [M]
        level = torch.bucketize(cell, torch.tensor(sizes, device=cell.device).cumsum(0), right=True)

        inside = defeat_cells(pad_sequence(targets.boxes, batch_first=True), self.grid, targets.canvas)
        terms = {}
        parts = (
            ("object", self.fg_weight, inside & targets.valid, 1.0),
            ("background", self.bg_weight, ~inside & targets.valid, self.keep),
        )
        for (name, weight, cells, share), region in zip(parts, (Region.OBJECT, Region.SAMPLE), strict=True):
            if weight:
                kept = error * entries.select(region)[chosen]
                total = kept.new_zeros(len(sizes)).index_add(0, level, kept / share)
                # the true number of such cells, not of those that were kept
                count = torch.stack([part.sum() for part in self.grid.split_levels(cells, batch.targets.canvas)])
                terms[name] = weight * half_mean(total, count)
        return terms

    def weight_option(self, part: str) -> str:
        """Each term has its own."""
        return "fg_weight" if part == "object" else "bg_weight"

    def active(self, batch: Batch, part: str) -> bool:
        """Whether the term's region has an entry."""
        region = Region.OBJECT if part == "object" else Region.SAMPLE
        return batch.entries is not None and bool(batch.entries.select(region).any())
