"""What the rows of a store will hold, counted from the annotations and the canvas alone: no image is read."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcli.engine.caching.plan import StorePlan
from kdcli.engine.caching.write import shard_micro_batches
from kdcli.engine.loading.samples import Item
from kdcli.store.arrays import ArraySpec, StoredTensor
from kdcli.store.image_codec import PIXELS
from kdcli.structures import Entries
from kdcli.tensors import Region

COUNT_ROWS = 2000  # at most: with entries that vary as much as their mean, 2 % of error
LEAST_ROWS = 128  # at least, however slow: 127 ms a row with nine anchors a cell at 800x1344
COUNT_SECONDS = 4.0
COUNTED_SHARDS = 32  # of which the micro-batches are counted


@dataclass(frozen=True)
class ElementCounts:
    """The real elements of each array: entries, boxes, valid cells, pixels of the image; 1 for what has none of these."""

    items: tuple[Item, ...]  # the rows that were counted
    units: dict[str, NDArray[np.int64]]  # by array path, one number for each of ``items``
    totals: dict[str, float]  # by array path, over all rows of the store


def count_units(plan: StorePlan) -> ElementCounts:
    """Count the elements of up to COUNT_ROWS rows, scattered over the store, in about COUNT_SECONDS at most.

    When these are not all rows, totals follow the number of annotated boxes, which is known for every image.
    """
    started = time.perf_counter()
    rows: list[int] = []
    found: list[dict[str, int]] = []
    for row in scattered(plan.schema.rows, COUNT_ROWS):
        if len(rows) >= LEAST_ROWS and time.perf_counter() - started > COUNT_SECONDS:
            break
        rows.append(row)
        found.append(units_of(plan, plan.item(row)))
    units = {path: np.array([one[path] for one in found]) for path in found[0]}
    boxes = np.diff(plan.source.dataset.annotations.box_offsets)[plan.positions].astype(np.float64)
    known = boxes[np.array(rows) // len(plan.views)]
    totals = {path: plan.schema.rows * mean_at(values, known, float(boxes.mean())) for path, values in units.items()}
    return ElementCounts(tuple(plan.item(r) for r in rows), units, totals)


def mean_at(values: NDArray[np.int64], known: NDArray[np.float64], mean: float) -> float:
    """The mean of ``values`` where the mean of ``known`` would be ``mean``: a regression estimate, never negative."""
    centred = known - known.mean()
    spread = float(np.square(centred).sum())
    slope = float((centred * values).sum()) / spread if spread else 0.0
    return max(0.0, float(values.mean()) + slope * (mean - float(known.mean())))


def scattered(total: int, count: int) -> list[int]:
    """At most ``count`` of the numbers below ``total``: one at random of each of so many equal parts, in random order.

    Not evenly spaced ones, which an even step would take from one view alone.
    """
    count, draw = min(count, total), np.random.default_rng(0)
    bounds = np.arange(count + 1) * total // count
    rows = bounds[:-1] + (draw.random(count) * np.diff(bounds)).astype(np.int64)
    return [int(row) for row in draw.permutation(rows)]


def units_of(plan: StorePlan, item: Item) -> dict[str, int]:
    """The elements of one row by array path; 1 for arrays at proposals, whose number the teacher decides."""
    schema, targets = plan.schema, plan.source.targets(item)
    geometry, entries = targets.geometry, targets.entries
    valid = schema.grid.valid(geometry.canvas, geometry.content)
    entry_count = 0 if entries is None else len(entries.index)
    units = {a.path: entry_count if a.path.startswith("entries/") and a.sparse else 1 for a in schema.layout()}
    if schema.images:
        units[PIXELS] = geometry.content[0] * geometry.content[1]
    for tensor in schema.tensors:
        real = (
            int(schema.valid_rows(tensor, valid).sum())
            if tensor.need.dense
            else _at(tensor, entries, len(targets.boxes))
        )
        for array in schema.tensor_arrays(tensor).values():
            # scales of a whole level have another first axis
            units[array.path] = real if array.shape[0] == schema.count(tensor) else 1
    return units


def element_bytes(array: ArraySpec) -> float:
    """Bytes of one element before compression."""
    return array.row_bytes / (array.shape[-1] if array.path == PIXELS else array.shape[0])


def _at(tensor: StoredTensor, entries: Entries | None, boxes: int) -> int:
    if tensor.need.region == Region.GT:
        return boxes
    if tensor.need.region == Region.PROPOSALS or entries is None:
        return 1
    return int(entries.select(tensor.need.region).sum())


def count_micro_batches(plan: StorePlan, shards: range) -> int:
    """The forward passes that ``shards`` take: rows of a shard are grouped by orientation, and a short group is filled."""
    # the last shard of a store may be a short one
    chosen = {*shards[:: max(1, len(shards) // COUNTED_SHARDS)], *shards[-1:]}
    found = rows = 0
    for shard in chosen:
        batches = shard_micro_batches(plan, shard)
        found += len(batches)
        rows += sum(map(len, batches))
    return round(found * rows_of(plan, shards) / rows) if rows else 0


def rows_of(plan: StorePlan, shards: range) -> int:
    """Rows in ``shards``."""
    return sum(stop - start for start, stop in map(plan.schema.shard_range, shards))
