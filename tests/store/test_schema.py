"""The store's format: what is planned for which need, its JSON form, and the refusal of impossible headers."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli.errors import GateError, StoreError
from kdcli.geometry.grid import Grid
from kdcli.store import schema as schema_module
from kdcli.store.arrays import StoredTensor
from kdcli.store.batch_buffers import collate_arrays
from kdcli.store.checksummed_json import digest
from kdcli.store.encoding_policy import plan_tensors, shard_rows_for
from kdcli.store.encodings import ChannelAffine, Encoding, Float, LogOdds8, VectorAffine
from kdcli.store.schema import MAX_SHARD_ROWS, SHARD_BYTES, StoreSchema, regions_of, row_tensor
from kdcli.structures import Canvas
from kdcli.tensors import (
    BOX_DISTRIBUTION,
    BOX_REGRESSION,
    CENTERNESS,
    CLS_LOGITS,
    FEATURES,
    RANK,
    Need,
    TensorSpec,
)
from tests.support.store_case import GRID, NEEDS, SPECS, make_row, make_schema

RETINA = Grid(base_scale=4.0, scales=(1.0, 2 ** (1 / 3), 2 ** (2 / 3)), ratios=(0.5, 1.0, 2.0))

sides = st.integers(1, 40).map(lambda n: 32 * n)
ENCODINGS: list[Encoding] = [Float("float32"), Float("float16"), LogOdds8(), VectorAffine(), ChannelAffine()]
encoded = st.sampled_from(ENCODINGS)
needs = st.builds(
    Need,
    st.sampled_from([FEATURES, CLS_LOGITS, BOX_REGRESSION, BOX_DISTRIBUTION, CENTERNESS]),
    st.sampled_from(["all", "main", "vlr", "main+vlr"]),
)


@st.composite
def schemas(draw: st.DrawFn) -> StoreSchema:
    """Any schema that could be written."""
    tensors = []
    for need in draw(st.lists(needs, min_size=1, max_size=6, unique=True)):
        per = draw(st.sampled_from(["cell", "anchor"])) if need.dense else "anchor"
        dims = tuple(draw(st.lists(st.integers(1, 20), min_size=1, max_size=2)))
        tensors.append(StoredTensor(need, per, dims, draw(encoded)))
    return StoreSchema(
        grid=draw(st.sampled_from([GRID, RETINA, Grid(offset=0.5, strides=(8, 16))])),
        canvas=Canvas(draw(sides), draw(sides)),
        rows=draw(st.integers(1, 10**6)),
        shard_rows=draw(st.integers(1, MAX_SHARD_ROWS)),
        tensors=tuple(tensors),
    )


@settings(deadline=None, max_examples=60)
@given(schemas())
def test_json_round_trip(schema: StoreSchema) -> None:
    assert StoreSchema.from_json(json.loads(json.dumps(schema.to_json()))) == schema


@settings(deadline=None, max_examples=60)
@given(schemas())
def test_paths_are_unique_and_none_lies_inside_another(schema: StoreSchema) -> None:
    paths = [a.path for a in schema.layout()]
    assert len(set(paths)) == len(paths)
    parents = {p.rsplit("/", k)[0] for p in paths for k in range(1, p.count("/") + 1)}
    assert not parents & set(paths)
    assert schema.sparse == any(p.startswith("entries/") for p in paths)


@settings(deadline=None, max_examples=30)
@given(schemas())
def test_every_row_is_in_one_shard(schema: StoreSchema) -> None:
    ranges = [schema.shard_range(s) for s in range(min(schema.num_shards, 50))]
    assert all(start < stop <= schema.rows for start, stop in ranges)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert schema.shard_range(schema.num_shards - 1)[1] == schema.rows


def test_default_plan() -> None:
    planned = {t.need.key: (t.per, t.dims, t.encoding) for t in plan_tensors(NEEDS, SPECS)}
    assert planned == {
        "features@all": ("cell", (3,), ChannelAffine()),
        "cls_logits@all": ("anchor", (5,), LogOdds8()),
        "cls_logits@main": ("anchor", (5,), Float("float16")),
        "box_distribution@main+vlr": ("anchor", (4, 9), VectorAffine()),
        "box_regression@vlr": ("anchor", (4,), Float("float16")),
        "rank@main": ("anchor", (2,), Float("float16")),  # a score: 8 bits would cost RM 4e-3 of its loss
    }
    assert plan_tensors(NEEDS[::-1] + NEEDS, SPECS) == plan_tensors(NEEDS, SPECS)


@pytest.mark.parametrize(("name", "dtype"), [("float16", "float16"), ("lossless", "float32")])
def test_other_plans(name: str, dtype: str) -> None:
    assert {t.encoding for t in plan_tensors(NEEDS, SPECS, name)} == {Float(dtype)}


def test_the_compact_plan_takes_six_bits_where_the_default_takes_eight() -> None:
    eight = {t.need: t.encoding for t in plan_tensors(NEEDS, SPECS)}
    six = {t.need: t.encoding for t in plan_tensors(NEEDS, SPECS, "compact")}
    changed = {n for n in eight if eight[n] != six[n]}
    assert {n.name for n in changed} == {FEATURES, BOX_DISTRIBUTION}
    assert {six[n] for n in changed} == {ChannelAffine(6), VectorAffine(6)}


def test_counts_of_a_real_canvas() -> None:
    canvas, wanted = Canvas(800, 1344), (Need(FEATURES, "all"), Need(CLS_LOGITS, "all"))
    tensors = plan_tensors(wanted, SPECS)
    for grid, anchors in ((GRID, 1), (RETINA, 9)):
        schema = StoreSchema(grid=grid, canvas=canvas, rows=10, shard_rows=2, tensors=tensors)
        counts = {t.need.name: schema.count(t) for t in schema.tensors}
        assert counts == {FEATURES: 22_400, CLS_LOGITS: 22_400 * anchors}
        assert sum(schema.sizes(schema.tensors[0])) == 22_400 * anchors


def test_regions() -> None:
    assert regions_of([Need(FEATURES, "all")]) == frozenset()
    assert regions_of(NEEDS) == {"main", "vlr"}
    assert make_schema(needs=(Need(RANK, "main"),)).regions == {"main"}


@pytest.mark.parametrize(
    ("row_bytes", "rows"), [(1, MAX_SHARD_ROWS), (2**20, 128), (SHARD_BYTES, 1), (10 * SHARD_BYTES, 1)]
)
def test_shard_rows(row_bytes: int, rows: int) -> None:
    assert shard_rows_for(row_bytes) == rows


def test_decode_gives_only_what_is_wanted() -> None:
    schema = make_schema()
    arrays = collate_arrays([make_row(schema, 3)], schema.layout())
    assert set(schema.decode(arrays, [NEEDS[0]])) == {"features@all"}


def test_collate_joins_sparse_rows_and_stacks_dense_ones() -> None:
    schema = make_schema()
    rows = [make_row(schema, k) for k in (0, 1, 2)]
    batch = collate_arrays(rows, schema.layout())
    assert batch["tensors/features@all/values"].shape == (3, 44, 3)
    assert batch["tensors/box_distribution@main+vlr/values"].shape == (0 + 1 + 44, 4, 9)
    assert batch["entries/count"].tolist() == [[0], [1], [44]]
    assert set(collate_arrays([{"row/identity": rows[0]["row/identity"]}], schema.layout())) == {"row/identity"}


def test_row_tensor_is_float32() -> None:
    value = row_tensor(torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True))
    np.testing.assert_array_equal(value, np.ones((2, 3), np.float32), strict=True)


def test_digest_does_not_depend_on_order() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})


def row_values(schema: StoreSchema, key: str, value: float) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Zeros of one entry a region, with one other value in ``key``."""
    values = {
        t.need.key: np.zeros((schema.count(t) if t.need.dense else 1, *t.dims), np.float32) for t in schema.tensors
    }
    values[key].reshape(-1)[1] = value
    return values


@pytest.mark.parametrize("key", [n.key for n in NEEDS])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("encoding", ["default", "lossless"])
def test_values_that_are_not_finite_stop_the_writing(key: str, value: float, encoding: str) -> None:
    schema = make_schema(encoding)
    with pytest.raises(GateError, match=f"{re.escape(key)} that is not finite") as caught:
        schema.encode(row_values(schema, key, value), np.ones(44, bool))
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("key", ["rank@main", "box_distribution@main+vlr"])
def test_values_that_float16_cannot_hold_stop_the_writing(key: str) -> None:
    values = row_values(make_schema(), key, -1e5)
    with pytest.raises(GateError, match=f"{re.escape(key)} beyond 65504.*--encoding lossless"):
        make_schema().encode(values, np.ones(44, bool))
    make_schema("lossless").encode(values, np.ones(44, bool))


BASE = make_schema().to_json()


def changed(path: str, value: object) -> dict[str, Any]:
    """The schema's JSON with one field set, or removed (``...``); ``tensors.0.dims`` is a path."""
    data = json.loads(json.dumps(copy.deepcopy(BASE)))
    *parents, last = path.split(".")
    storage: Any = data
    for name in parents:
        storage = storage[int(name) if name.isdigit() else name]
    if value is ...:
        del storage[last]
    else:
        storage[last] = value
    return dict(data)


IMPOSSIBLE: dict[str, list[Any]] = {
    "grid": [..., None],
    "grid.strides": [..., [], [0], [-8], ["a"], "8", [[8]], 8, [1e-9], [0.5], [None]],
    "grid.scales": [[], 3, ["x"], None, [-1.0]],
    "grid.unknown": [1],
    "canvas": [..., None, "", "0", "33", "320x", "999999968x999999968", "9" * 5000, "²", 5, []],
    "rows": [..., None, 0, -1, 2**40, 10**400, math.inf, math.nan, "many", [], {}, 3.5, True],
    "shard_rows": [..., None, 0, -4, 2**21, math.inf, "x", []],
    "tensors": [..., None, 5, "abc", {"a": 1}, [5], ["x"], [None], [[]], []],
    "tensors.0.name": [..., "", "../../../etc", "/etc", "a//b", 5, [], "features@all"],
    "tensors.0.region": [..., "", "everywhere", "main/vlr", 5, "main+main+x"],
    "tensors.0.per": [..., "row", "", 5, []],
    "tensors.0.dims": [..., [2**40], [2**20, 2**20], [10**300], [-1], [0], ["a"], [1.5], [None], "ab", 7, [[1]]],
    "tensors.0.encoding": [..., {}, 5, "float16", [], {"name": "zip"}, {"name": ["float16"]}],
}
CASES = [(path, value) for path, values in IMPOSSIBLE.items() for value in values]


@pytest.mark.parametrize(("path", "value"), CASES, ids=lambda v: repr(v)[:24])
def test_an_impossible_schema_is_refused_before_anything_is_allocated(path: str, value: object) -> None:
    data = changed(path, value)
    tracemalloc.start()
    try:
        with pytest.raises(StoreError):
            StoreSchema.from_json(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20


@pytest.mark.parametrize("data", [None, 5, "text", [], {}, [BASE]])
def test_something_that_is_no_schema(data: Any) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        StoreSchema.from_json(data)


def test_the_same_tensor_twice_is_refused() -> None:
    data = json.loads(json.dumps(BASE))
    data["tensors"].append(data["tensors"][0])
    with pytest.raises(StoreError):
        StoreSchema.from_json(data)


def test_the_bounds_leave_room_for_real_stores() -> None:
    # RetinaNet on COCO with features and class logits in float32, the largest row that any method asks for: 92 MB
    specs = {FEATURES: TensorSpec("cell", (256,)), CLS_LOGITS: TensorSpec("anchor", (80,))}
    tensors = plan_tensors([Need(FEATURES, "all"), Need(CLS_LOGITS, "all")], specs, "lossless")
    schema = StoreSchema(grid=RETINA, canvas=Canvas(800, 1344), rows=10**6, shard_rows=1, tensors=tensors)
    assert StoreSchema.from_json(schema.to_json()) == schema
    assert max(a.row_bytes for a in schema.layout()) < schema_module.ROW_BYTES_LIMIT / 10
