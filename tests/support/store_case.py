"""A small synthetic store: every encoding, main and VLR entries, images without any, a last shard that is not full."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from kdcli.geometry.assign import AssignerSpec
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec
from kdcli.store.encoding_error import Measured
from kdcli.store.encoding_policy import plan_tensors
from kdcli.store.manifest import Manifest
from kdcli.store.provenance import DatasetRecord, Origin, TeacherRecord, TeacherRun
from kdcli.store.reader import Row
from kdcli.store.row_identity import pack_identity
from kdcli.store.schema import GEOMETRY_LENGTH, StoreSchema
from kdcli.store.storage.base import Where
from kdcli.store.writer import StoreWriter, create_store
from kdcli.structures import MAIN, VLR, Canvas, RowKey
from kdcli.tensors import (
    BOX_DISTRIBUTION,
    BOX_REGRESSION,
    CLS_LOGITS,
    FEATURES,
    RANK,
    Need,
    TensorSpec,
)

Arrays = dict[str, NDArray[Any]]

GRID = Grid()
CANVAS = Canvas(32, 64)  # 44 cells
IMAGE_IDS = np.array([7, 3, 2**40 + 1, 12, 5, 9, 11], np.int64)
VIEWS = ("identity", "hflip")
SHARD_ROWS = 4  # 14 rows in 4 shards, the last of 2
SPECS = {
    FEATURES: TensorSpec("cell", (3,)),
    CLS_LOGITS: TensorSpec("anchor", (5,)),
    BOX_DISTRIBUTION: TensorSpec("anchor", (4, 9)),
    BOX_REGRESSION: TensorSpec("anchor", (4,)),
}
NEEDS = (
    Need(FEATURES, "all"),
    Need(CLS_LOGITS, "all"),
    Need(CLS_LOGITS, "main"),
    Need(BOX_DISTRIBUTION, "main+vlr"),
    Need(BOX_REGRESSION, "vlr"),
    Need(RANK, "main"),
)


def make_schema(encoding: str = "default", needs: tuple[Need, ...] = NEEDS) -> StoreSchema:
    """The schema of the store."""
    return StoreSchema(
        grid=GRID, canvas=CANVAS, rows=len(IMAGE_IDS) * len(VIEWS), shard_rows=SHARD_ROWS,
        tensors=plan_tensors(needs, SPECS, encoding),
    )  # fmt: skip


def make_manifest(schema: StoreSchema, **changes: Any) -> Manifest:
    """The manifest of a store of ``schema``, of a teacher and a data set that are not there."""
    manifest = Manifest(
        teacher=TeacherRecord(
            model={"detector": "gfl", "backbone": "resnet18"}, weights_sha256="0" * 64, ap=None, specs=SPECS
        ),
        teacher_run=TeacherRun(precision="fp32", micro_batch=8, device="cpu", threads=1, compile=None),
        dataset=DatasetRecord(
            annotations_sha256="1" * 64, categories=((1, "a"),), num_images=len(IMAGE_IDS), split="train", left_out=()
        ),
        class_order=(0,),
        views=VIEWS,
        view_seed=0,
        assigner=AssignerSpec("atss").to_json(),
        regions=RegionSpec().to_json(),
        versions={"zarr": zarr.__version__},
        methods=("rm",),
        method_options={"rm": {}},
        method_needs={} if schema.version == 1 else {"rm": ("rank@main",)},
        origin=Origin(data="data", teacher="teacher"),
        schema=schema,
        added_on={},
    )
    return replace(manifest, **changes)


def measured(rows: int) -> Measured:
    """Sums of a shard of so many rows."""
    return Measured(encoding={"rank@main": {"squares": 1.0, "reference": 4.0, "count": float(rows), "worst": 0.5}})


def make_row(schema: StoreSchema, index: int) -> Arrays:
    """Row ``index`` as the engine hands it to the writer; row 0 has no entries, row 1 one, row 2 all anchors."""
    rng = np.random.default_rng(index)
    total, cells = GRID.num_total(CANVAS), GRID.num_cells(CANVAS)
    count = {0: 0, 1: 1, 2: total}.get(index, int(rng.integers(2, total)))
    storage = np.sort(rng.permutation(total)[:count])
    flag = rng.integers(1, (MAIN | VLR) + 1, count).astype(np.uint8)
    main, vlr = (flag & MAIN) != 0, (flag & VLR) != 0
    arrays: Arrays = {
        "row/identity": pack_identity(rng.bytes(32), rng.bytes(16), keys()[index], schema.version),
        "row/geometry": rng.integers(0, 99, GEOMETRY_LENGTH).astype(np.float64),
        "entries/count": np.array([count], np.int32),
        "entries/index": storage.astype(np.int32),
        "entries/flag": flag,
        "entries/gt": np.where(main, rng.integers(0, 9, count), -1).astype(np.int16),
        "entries/weight": np.where(vlr, rng.random(count), 0).astype(np.float32),
    }
    counts = {"main": int(main.sum()), "vlr": int(vlr.sum()), "main+vlr": count}
    values = {
        t.need.key: rng.normal(-2, 3, (schema.count(t) if t.need.dense else counts[t.need.region], *t.dims))
        for t in schema.tensors
    }
    valid = rng.random(cells) < 0.8
    return arrays | schema.encode({k: v.astype(np.float32) for k, v in values.items()}, valid)


def create(path: Where, schema: StoreSchema) -> None:
    """An empty store."""
    assert create_store(path, make_manifest(schema), IMAGE_IDS)


def write(path: Where, schema: StoreSchema, shards: list[int]) -> None:
    """Write the given shards with a writer of their own."""
    writer = StoreWriter(path, schema)
    for shard in shards:
        rows = [make_row(schema, index) for index in range(*schema.shard_range(shard))]
        writer.write_shard(shard, rows, measured(len(rows)))


def make_store(path: Where, schema: StoreSchema) -> None:
    """A complete store."""
    create(path, schema)
    write(path, schema, list(range(schema.num_shards)))


def keys() -> list[RowKey]:
    """The keys of all rows, in row order."""
    return [RowKey(int(image), view) for image in IMAGE_IDS for view in VIEWS]


def assert_row_equal(row: Row, written: Arrays) -> None:
    """What was read is what was encoded, bit for bit and dtype for dtype."""
    assert row.content + row.guard == written["row/identity"].tobytes()[:48]
    np.testing.assert_array_equal(row.geometry, written["row/geometry"], strict=True)
    assert row.entries is not None
    for name in ("index", "flag", "gt", "weight"):
        ours = getattr(row.entries, name).numpy()
        np.testing.assert_array_equal(ours, written[f"entries/{name}"].astype(ours.dtype), strict=True)
    assert torch.equal(row.entries.image, torch.zeros(len(row.entries.index), dtype=torch.int64))
    for path, value in row.arrays.items():
        np.testing.assert_array_equal(value, written[path], strict=True, err_msg=path)


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store, by its path inside it."""
    return {f.relative_to(store).as_posix(): f.read_bytes() for f in sorted(store.rglob("*")) if f.is_file()}
