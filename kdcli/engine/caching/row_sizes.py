"""What a method stores for an image, before there is a teacher or a data set: ``kdcli methods`` shows it.

Dense arrays count whole, as they are allocated. Sparse ones count the rows that one fixed image fills: seven boxes, the
average of COCO, which regions are computed for as they are for a real one. Nothing is compressed: a store on the disk is
smaller. ``cache-teacher --estimate`` measures real images instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from kdcli.detectors.base import Detector
from kdcli.engine.teacher.specs import with_classes
from kdcli.geometry.assign import assign
from kdcli.geometry.regions import RegionSpec, compute_entries
from kdcli.store.arrays import StoredTensor
from kdcli.store.encoding_policy import derived_from_dense, plan_tensors
from kdcli.store.schema import MAX_PROPOSALS, StoreSchema
from kdcli.structures import Canvas, Entries
from kdcli.tensors import DERIVED, FEATURES, Need, Region, TensorSpec

CHANNELS = 256  # of the teacher's neck

# x1 y1 x2 y2 as shares of the canvas: at 800x1344 boxes of 25 to 475 px, two of which overlap. GFL has 69 positives and 911
# entries of LD there; 92 images of COCO, of 6.5 boxes, had 58 and 834 on average.
TYPICAL_BOXES = (
    (0.05, 0.10, 0.40, 0.70),
    (0.30, 0.40, 0.42, 0.62),
    (0.55, 0.20, 0.66, 0.55),
    (0.70, 0.60, 0.76, 0.72),
    (0.80, 0.15, 0.85, 0.21),
    (0.90, 0.50, 0.93, 0.56),
    (0.62, 0.85, 0.64, 0.88),
)


def typical_boxes(canvas: Canvas) -> Tensor:
    """The boxes of the image that prices are for, [7, 4] float32, xyxy canvas pixels."""
    sides = torch.tensor([canvas.width, canvas.height, canvas.width, canvas.height])
    return torch.tensor(TYPICAL_BOXES) * sides


def missing(needs: Iterable[Need], specs: Mapping[str, TensorSpec]) -> list[str]:
    """The tensors, sorted, that ``needs`` read and a detector with ``specs`` cannot give."""
    return sorted({DERIVED.get(need.name, need.name) for need in needs} - set(specs))


def specs_at(detector: Detector, num_classes: int, channels: int = CHANNELS) -> dict[str, TensorSpec]:
    """What ``detector`` would give with so many classes and neck channels: prices need no full-size weights."""
    specs = with_classes(detector.specs(), num_classes)
    return {n: TensorSpec(s.per, (channels,)) if n == FEATURES else s for n, s in specs.items()}


def row_bytes(
    detector: Detector, specs: Mapping[str, TensorSpec], needs: Iterable[Need], regions: RegionSpec, canvas: Canvas,
    encoding: str = "default",
) -> dict[str, int]:  # fmt: skip
    """Bytes of each array of a row, by its path, for the typical image. ``specs``: of ``specs_at``.

    With 1000 proposals and the ground-truth boxes behind them. Raises KeyError for a tensor that ``specs`` lacks.
    """
    boxes = typical_boxes(canvas)
    needs = tuple(needs)
    derived = derived_from_dense(needs, encoding)
    tensors = plan_tensors([n for n in needs if n not in derived], specs, encoding)
    schema = StoreSchema(
        grid=detector.grid, canvas=canvas, rows=1, shard_rows=1, tensors=tensors, max_boxes=len(boxes),
        derived_from_dense=derived,
    )  # fmt: skip
    assigned = assign(detector.assigner, detector.grid, canvas, boxes, canvas.size)
    entries = compute_entries(schema.regions, regions, detector.grid, canvas, boxes, assigned, canvas.size)
    real = {array.path: _rows(t, entries, len(boxes)) for t in tensors for array in schema.tensor_arrays(t).values()}
    return {
        array.path: array.row_bytes // array.shape[0] * real.get(array.path, len(entries.index))
        if array.sparse
        else array.row_bytes
        for array in schema.layout()
    }


def _rows(tensor: StoredTensor, entries: Entries, boxes: int) -> int:
    """Rows that a sparse ``tensor`` has in the typical image."""
    region = tensor.need.region
    if region in (Region.ALL, Region.GT, Region.PROPOSALS):
        return {Region.ALL: 0, Region.GT: boxes, Region.PROPOSALS: MAX_PROPOSALS + boxes}[Region(region)]
    return int(entries.select(region).sum())
