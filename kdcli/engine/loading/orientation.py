"""Which orientation of the canvas each item takes: the images of a batch share one."""

from __future__ import annotations

from collections.abc import Sequence

from kdcli.data.views import orient
from kdcli.engine.loading.samples import Item, SampleSource
from kdcli.structures import Canvas


def orientation(source: SampleSource, item: Item) -> Canvas:
    """The orientation of the canvas that ``item`` takes."""
    if item[1].startswith("crop-"):
        return source.geometry(item).canvas
    return orient(source.canvas, *source.dataset.image_size(item[0]))


def group_by_orientation(source: SampleSource, items: Sequence[Item]) -> dict[tuple[int, int], list[int]]:
    """For each orientation (height, width) the indices in ``items`` of those that take it, in their order.

    The orientation of the first item comes first.
    """
    return group_by_size([orientation(source, item).size for item in items])


def group_by_size(sizes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """For each of the ``sizes`` the indices at which it stands, in their order; the first size comes first."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return groups


def batches_by_orientation(source: SampleSource, items: Sequence[Item], size: int) -> list[list[Item]]:
    """``items`` in their order, grouped by orientation and cut into batches of ``size``; the last of a group may be short."""
    groups = group_by_orientation(source, items).values()
    return [[items[k] for k in group[start : start + size]] for group in groups for start in range(0, len(group), size)]
