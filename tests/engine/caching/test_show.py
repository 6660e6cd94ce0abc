"""What ``cache show`` reads of a row."""

from __future__ import annotations

from pathlib import Path

import torch

from kdcli.engine.caching.show import read_for_show
from kdcli.store.reader import StoreReader
from kdcli.structures import RowKey
from tests.support.small_runs import cache_options, write


def test_boxes_are_those_of_the_positives_among_other_regions(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    """DeFeat's thin form reads cells of objects, so the entries are more than those that have edges."""
    alone = write(cache_options(shapes, teacher, method="ld"), tmp_path / "alone")
    store = write(cache_options(shapes, teacher, method="ld,defeat_thin"), tmp_path / "store")
    image = StoreReader(store).image_ids[0]
    entries = StoreReader(store).read(RowKey(image, "identity")).entries
    assert entries is not None
    assert not entries.select("main+vlr").all()
    shown, plain = (read_for_show(s, None, image, None) for s in (store, alone))
    assert shown.teacher_boxes is not None
    assert plain.teacher_boxes is not None
    assert len(shown.teacher_boxes) == int(entries.select("main").sum())
    assert torch.equal(shown.teacher_boxes, plain.teacher_boxes)
