"""Whether the regions of a store are those that are computed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kdcli.engine.loading.samples import SampleSource
from kdcli.errors import StoreError
from kdcli.store.reader import StoreReader
from kdcli.structures import RowKey

RECHECKED_ROWS = 64
RECHECK_TOLERANCE = 1e-3  # of a row's anchors: float64 on another CPU may move a tie


def spread(positions: NDArray[np.int64], views: Sequence[str], count: int) -> list[tuple[int, str]]:
    """At most ``count`` items, evenly over the images and over the views."""
    step = max(1, len(positions) // count)
    return [(int(p), views[k % len(views)]) for k, p in enumerate(positions[::step][:count])]


def recheck_regions(
    source: SampleSource, reader: StoreReader, positions: NDArray[np.int64], views: Sequence[str]
) -> int:
    """Compute the entries of up to 64 rows again and compare them with those of ``reader``; returns how many were compared.

    Raises StoreError when more than 0.1 % of a row's anchors differ.
    """
    if not reader.schema.sparse:
        return 0
    computed = replace(source, regions=reader.schema.regions)
    chosen = spread(positions, views, RECHECKED_ROWS)
    for item in chosen:
        key, targets = RowKey(source.dataset.image_id(item[0]), item[1]), computed.targets(item)
        ours, theirs = targets.entries, reader.read(key).entries
        assert ours is not None
        assert theirs is not None
        mine = set(zip(ours.index.tolist(), ours.flag.tolist(), strict=True))
        stored = set(zip(theirs.index.tolist(), theirs.flag.tolist(), strict=True))
        if len(mine ^ stored) > RECHECK_TOLERANCE * source.grid.num_total(targets.geometry.canvas):
            raise StoreError(
                f"store '{reader.storage}', {key}: {len(mine ^ stored)} region entries differ from those computed here; the "
                "boxes or the region rules have changed: write the store again"
            )
    return len(chosen)
