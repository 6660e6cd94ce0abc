"""Records of COCO annotation files."""

from __future__ import annotations

from typing import Any


def box(id_: int, image_id: int, category_id: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    """An annotation record."""
    area = bbox[2] * bbox[3]
    return {
        "id": id_,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "area": area,
        "iscrowd": 0,
    } | more
