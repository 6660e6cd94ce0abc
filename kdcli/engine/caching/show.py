"""What ``cache show`` draws: one stored row, read back and joined with its image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kdcli.data.coco import open_split
from kdcli.data.images import read_image
from kdcli.data.views import Geometry, render
from kdcli.engine.loading.samples import canvas_boxes
from kdcli.engine.loading.selection import as_stored
from kdcli.errors import StoreError
from kdcli.geometry.derive import decode_distribution
from kdcli.store.batch_buffers import collate_arrays
from kdcli.store.reader import StoreReader
from kdcli.store.storage.base import Where
from kdcli.structures import Entries, RowKey
from kdcli.tensors import BOX_DISTRIBUTION, CLS_LOGITS, MAIN_OR_VLR, RANK, Need, Region


@dataclass(frozen=True, kw_only=True)
class ShownRow:
    """A row for drawing; boxes are xyxy canvas pixels."""

    key: RowKey
    image: Tensor  # [3, H, W] uint8, the view that the teacher saw
    boxes: Tensor  # [G, 4] ground truth
    labels: list[str]
    entries: Entries | None
    centers: Tensor  # [M, 2] of the entries' anchors, pixels
    teacher_boxes: Tensor | None  # [T, 4] decoded at the positives, None when distributions are not stored
    teacher_scores: Tensor | None  # [T], of the ground-truth class
    heat: Tensor | None  # [h, w] mean absolute feature of the finest level, when features are stored


def read_for_show(store: Where, data: str | None, image_id: int, view: str | None) -> ShownRow:
    """Read the row of an image; ``data``: None for the folder that the store was written from.

    Raises StoreError when the row is not in the store, or annotations or image are not those that it was written from.
    """
    reader = StoreReader(store)
    record = reader.manifest.dataset
    dataset = as_stored(open_split(Path(data or reader.manifest.origin.data), record.split), record)
    differences = reader.manifest.run_differences(dataset.fingerprint())
    if differences:
        raise StoreError(f"store '{store}' belongs to another data set: {'; '.join(differences)}")
    key = RowKey(image_id, view or reader.views[0])
    row = reader.read(key)
    geometry = Geometry.from_array(row.geometry)
    position = dataset.index_of(image_id)
    if row.image is not None:
        image = torch.from_numpy(row.image)
    else:
        pixels, content = read_image(dataset.image_path(position), (geometry.height, geometry.width), dataset.exif)
        if content != row.content:
            raise StoreError(f"{key}: the image file is not the one that the teacher saw")
        image = render(pixels, geometry)
    boxes, labels = canvas_boxes(dataset, position, geometry)
    names = [dataset.classes[k].name for k in labels.tolist()]
    schema, canvas = reader.schema, geometry.canvas
    tensors = schema.decode(collate_arrays([row.arrays], reader.layout.values()), [t.need for t in reader.tensors])
    index = row.entries.index if row.entries is not None else torch.zeros(0, dtype=torch.int64)
    centers = schema.grid.centers(canvas, torch.float32)[index // schema.grid.num_anchors]
    teacher_boxes = teacher_scores = heat = None
    edges = Need(BOX_DISTRIBUTION, MAIN_OR_VLR).key
    if row.entries is not None and edges in tensors:
        main, read = row.entries.select(Region.MAIN), row.entries.select(MAIN_OR_VLR)  # there may be other regions too
        strides = schema.grid.anchor_strides(canvas, torch.float32)[index]
        teacher_boxes = decode_distribution(tensors[edges], centers[read], strides[read])[main[read]]
    if Need(RANK, Region.MAIN).key in tensors:
        teacher_scores = tensors[Need(RANK, Region.MAIN).key][:, 0]
    elif Need(CLS_LOGITS, Region.MAIN).key in tensors:
        assert row.entries is not None
        truth = labels[row.entries.gt[row.entries.select(Region.MAIN)]]
        teacher_scores = (
            tensors[Need(CLS_LOGITS, Region.MAIN).key].sigmoid().gather(1, truth[:, None].long()).squeeze(1)
        )
    if "features@all" in tensors:
        height, width = schema.grid.level_shapes(canvas)[0]
        heat = tensors["features@all"][0, : height * width].abs().mean(dim=-1).reshape(height, width)
    return ShownRow(
        key=key, image=image, boxes=boxes, labels=names, entries=row.entries, centers=centers,
        teacher_boxes=teacher_boxes, teacher_scores=teacher_scores, heat=heat,
    )  # fmt: skip
