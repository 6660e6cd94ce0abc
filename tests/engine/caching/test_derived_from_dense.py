"""Nothing is stored twice: a need at entries is read from the dense tensor of its name where that holds it as exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdcli.engine.caching.plan import plan_store
from kdcli.engine.runtime.progress import NullReporter
from kdcli.errors import StoreError
from kdcli.store.batch_buffers import collate_arrays
from kdcli.store.reader import StoreReader
from kdcli.store.schema import StoreSchema
from kdcli.structures import Entries, RowKey
from kdcli.tensors import Need, Tensors
from tests.support.small_runs import cache_options, write

THIN, FINE = Need("features", "object+sample"), Need("features", "fine_grained")
IMITATION = {"ld": {"imitation": "fine_grained", "imitation_weight": 1.0}}
EVERYTHING = "ld,rm,pfi,bckd,defeat,defeat_thin,cwd"


@pytest.mark.parametrize("encoding", ["lossless", "float16", "default"])
def test_no_tensor_is_stored_twice(shapes: Path, teacher: Path, encoding: str) -> None:
    options = cache_options(shapes, teacher, method=EVERYTHING, methods=IMITATION, encoding=encoding)
    schema = plan_store(options, NullReporter()).schema
    assert {THIN, FINE} <= set(schema.derived_from_dense)
    dense = {t.need.name for t in schema.tensors if t.need.dense}
    twice = {t.need.key for t in schema.tensors if t.need.at_entries and t.need.name in dense}
    # 8 bits of a dense logit are not as exact as the float16 that RM and LD's class term read
    assert twice == ({"cls_logits@main"} if encoding == "default" else set())
    assert StoreSchema.from_json(schema.to_json()) == schema


def rows(store: Path, needs: list[Need], image_ids: list[int]) -> tuple[Tensors, Entries]:
    """What the teacher of a store gives for a batch."""
    reader = StoreReader(store, needs)
    found = [reader.read(RowKey(i, "hflip")) for i in image_ids]
    entries = Entries.collate([r.entries for r in found if r.entries is not None])
    return reader.schema.decode(
        collate_arrays([r.arrays for r in found], reader.layout.values()), needs, entries
    ), entries


def test_served_tensors_are_the_stored_ones(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    common = {"methods": IMITATION, "encoding": "lossless"}
    both = write(cache_options(shapes, teacher, method="ld,defeat,defeat_thin", **common), tmp_path / "both")
    alone = write(cache_options(shapes, teacher, method="ld,defeat_thin", **common), tmp_path / "alone")
    assert not [t for t in StoreReader(both).schema.tensors if t.need in (THIN, FINE)]
    images = list(StoreReader(both).image_ids[:3])
    needs = [THIN, FINE, Need("box_distribution", "main+vlr")]
    ours, entries = rows(both, needs, images)
    theirs, same = rows(alone, needs, images)
    assert torch.equal(entries.index, same.index)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert len(value) > 0
        assert torch.equal(ours[key], value), key
    assert list(rows(both, [Need("features", "all"), THIN], images)[0]) == ["features@all", THIN.key]
    with pytest.raises(StoreError, match="lacks rank@main"):
        StoreReader(both, [Need("rank", "main")])
