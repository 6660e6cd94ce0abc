"""The boxes of a split: each against its image's border, and all together, whether anything is left to train on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdcli.data import coco_boxes as masks
from kdcli.data.coco import Dataset
from kdcli.data.coco_boxes import MAX_OVER, Mask
from kdcli.data.findings import Fault, Warned, box_name, warned

BEYOND = OUTSIDE, OVER = "box outside", "box over the border"  # kinds of faults that --clip-boxes cures
MANY = 0.1  # share of the boxes from which on a run says that they are dropped
MOST = 0.5
NEARLY_ALL = 0.99
FEW = 10  # boxes: less prove nothing about the form of all


@dataclass(frozen=True)
class BoxFindings:
    """What was found, and which boxes [M] are trained on."""

    faults: tuple[Fault, ...]
    warnings: tuple[Warned, ...]
    trained: Mask
    clip: bool  # boxes are clipped, which would be refused
    nothing: str | None  # why there is no box to train on, None when there is one
    unlabelled: bool  # there is none, and not because something is wrong: no annotation, or crowds alone


def check_boxes(dataset: Dataset, clip: bool) -> BoxFindings:
    """``clip``: boxes beyond the border are clipped, and dropped where nothing is left, instead of being faults."""
    notes = dataset.annotations
    owner = masks.owners(notes)
    over, outside, crowd = masks.pixels_over(notes), masks.outside(notes), notes.crowd
    far = (over > MAX_OVER) & ~outside
    all_thin, relative = masks.thin(notes), masks.relative(notes)
    thin = all_thin & ~outside & ~far
    trained = ~crowd & (notes.category >= 0) & ~all_thin
    real = int((~crowd).sum())
    faults = [] if clip else [*_beyond(dataset, outside, OUTSIDE), *_beyond(dataset, far, OVER)]

    def named(kind: str, mask: Mask, loud: bool) -> list[Warned]:
        rows = np.flatnonzero(mask)
        examples = [box_name(dataset, row, int(owner[row])) for row in rows[:5].tolist()]
        return warned(kind, examples, loud, len(rows))

    def many(mask: Mask) -> bool:
        return int((mask & ~crowd).sum()) >= max(1, MANY * real)

    dropped = thin & ~crowd
    warnings = [
        *named("box over the border by up to 2 px, clipped", (over > 0) & ~outside & ~thin & ~far, False),
        *named(
            "box within 0..1, as relative coordinates are, dropped: multiply them by width and height",
            dropped & relative, many(dropped & relative),
        ),
        *named("box with a side under 1 px, dropped", dropped & ~relative, many(dropped & ~relative)),
        *named(
            "'area' that cannot be (none, negative, over the image's or twice the box's); AP goes by the box's own",
            masks.impossible_area(notes), True,
        ),
    ]  # fmt: skip
    if clip:
        warnings += named("box over the border by more than 2 px, clipped", far, True)
        warnings += named("box wholly outside of its image, dropped", outside, True)
    form = _corner_form(dataset, far | outside)
    left = (trained & ~relative).any()  # a relative box of a whole image, [0, 0, 1, 1], has a side of 1
    nothing = None if left else _why_none(dataset, outside, relative, all_thin)
    return BoxFindings(
        faults=(*form, *faults), warnings=tuple(warnings), trained=trained,
        clip=clip and bool((far | outside).any()), nothing=nothing,
        unlabelled=real == 0 and not len(notes.orphans),
    )  # fmt: skip


def _beyond(dataset: Dataset, mask: Mask, kind: str) -> list[Fault]:
    """A fault for each box of ``mask``."""
    notes = dataset.annotations
    owner, over = masks.owners(notes), masks.pixels_over(notes)
    faults = []
    for row in np.flatnonzero(mask).tolist():
        image = int(owner[row])
        size = f"{notes.heights[image]}x{notes.widths[image]}"
        by = "wholly outside" if kind == OUTSIDE else f"{over[row]:.1f} px over the border of"
        box = notes.boxes_xywh[row].tolist()
        message = f"annotation {notes.annotation_ids[row]}: box {box} lies {by} the image of {size} (height x width)"
        faults.append(Fault(kind, box_name(dataset, row, image), message, image))
    return faults


def _corner_form(dataset: Dataset, beyond: Mask) -> list[Fault]:
    """A fault of the whole split when most boxes run over the border and nearly all fit as x1, y1, x2, y2."""
    notes = dataset.annotations
    known = masks.fits_as_corners(notes)
    if len(beyond) < FEW or beyond.mean() <= MOST or known.mean() < NEARLY_ALL:
        return []
    message = (
        f"{int(beyond.sum())} of {len(beyond)} boxes run over the border, and {int(known.sum())} fit if their numbers are x1, "
        "y1, x2, y2: COCO's are x, y, width, height; write x2 - x1 and y2 - y1"
    )
    return [Fault("boxes in another form", str(dataset.annotations_path), message)]


def _why_none(dataset: Dataset, outside: Mask, relative: Mask, thin: Mask) -> str:
    """Why no box of the split is trained on, with counts."""
    notes = dataset.annotations
    total = len(notes.crowd)
    if len(notes.orphans) and not total:
        return f"all {len(notes.orphans)} annotations are on images that 'images' does not list; correct their image_id"
    if not total:
        return "there is no annotation; label the images, or name another annotation file"
    real = ~notes.crowd
    count = int(real.sum())
    if not count:
        return f"all {total} boxes are crowd (iscrowd 1), which is never trained on; set it to 0"
    unknown = real & (notes.category < 0)
    kinds = (
        (unknown, "have a category_id that 'categories' does not list; correct it"),
        (real & relative & ~unknown, "lie within 0..1: relative coordinates; multiply them by width and height"),
        (real & outside & ~unknown, "lie wholly outside of their images; correct the boxes or the image sizes"),
        (real & thin & ~outside & ~relative & ~unknown, "have a side under 1 pixel; COCO's are x, y, width, height in pixels"),
    )  # fmt: skip
    for mask, words in kinds:
        if int(mask.sum()) == count:
            return f"{'the only box' if count == 1 else f'all {count} boxes'} {words}"
    parts = [f"{int(mask.sum())} {words}" for mask, words in kinds if mask.any()]
    return f"of {count} boxes {'; '.join(parts)}"
