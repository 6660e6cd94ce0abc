"""Categories of one name. Everything that knows classes by name would take the first of them for all.

Roboflow writes a root class, id 0, above the real ones, without a box; it is named after the project, and so often like a
class of it. A category without boxes that shares its name is dropped, and `kdcli data check` and every run say so.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from kdcli.classes import ClassList
from kdcli.data.coco_index import Annotations
from kdcli.errors import DataError


def with_distinct_names(notes: Annotations, path: Path) -> Annotations:
    """``notes`` without unused categories whose name another one has. Raises DataError when two of a name have boxes.

    Where none of a name has boxes the highest id stays, since the root's is the lowest.
    """
    classes = notes.categories
    twins = [group for group in classes.by_name().values() if len(group) > 1]
    if not twins:
        return notes
    counts = np.bincount(notes.category[notes.category >= 0], minlength=len(classes))
    boxes = {category.id: int(count) for category, count in zip(classes, counts, strict=True)}
    gone = set()
    for group in twins:
        used = [c for c in group if boxes[c.id]]
        if len(used) > 1:
            which = " and ".join(f"{c.id} ({boxes[c.id]} boxes)" for c in used)
            raise DataError(
                f"{path}: categories {which} have the same name {used[0].name!r}, and classes are matched by name; give "
                "them names of their own, or make them one category"
            )
        stays = used[0] if used else group[-1]
        gone |= {c.id for c in group} - {stays.id}
    kept = [k for k, c in enumerate(classes) if c.id not in gone]
    position = np.full(len(classes) + 1, -1, np.int32)  # the last entry is that of the category -1
    position[kept] = np.arange(len(kept))
    return replace(
        notes,
        category=position[notes.category],
        categories=ClassList(classes[k] for k in kept),
        dropped=tuple(c for c in classes if c.id in gone),
    )
