"""What ``--shuffle shards`` costs in randomness and saves in reading, against the full shuffle.

Prints one JSON object. Randomness: the share of the pairs of images of a batch that lie in one shard, over a planned epoch
of ``--images`` images in two views, by rows a shard. Reading: a store of random rows is written to ``--out`` and a part of
an epoch is read from it in both orders, 32 batches in turn, with the page cache warm and (``cold``) dropped before each
turn: shard files opened a row, rows a second.

    python benchmarks/shuffle.py --out FOLDER [--images 118287] [--stored 8192] [--shard-rows 32]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from kdcli.detectors.dense.recipes import GFL
from kdcli.engine.loading.epoch_order import plan_epoch
from kdcli.engine.loading.samples import Item, SampleSource
from kdcli.engine.training.run_folder import hardware
from kdcli.geometry.regions import RegionSpec
from kdcli.store import reader as reading
from kdcli.store.encoding_error import Measured
from kdcli.store.encoding_policy import plan_tensors
from kdcli.store.manifest import Manifest
from kdcli.store.provenance import DatasetRecord, Origin, TeacherRecord, TeacherRun
from kdcli.store.reader import StoreReader
from kdcli.store.row_identity import pack_identity
from kdcli.store.schema import StoreSchema
from kdcli.store.shards import open_shards, pack_chunk
from kdcli.store.writer import StoreWriter, create_store
from kdcli.structures import Canvas, RowKey
from kdcli.tensors import Need, TensorSpec

VIEWS = ("identity", "hflip")
ORDERS = ("full", "shards")
TURN = 32  # batches


class Images:
    """Ids 1 to N; each fourth image stands upright."""

    def __init__(self, number: int) -> None:
        self.annotations = SimpleNamespace(image_ids=np.arange(1, number + 1))

    def image_id(self, position: int) -> int:
        return position + 1

    def image_size(self, position: int) -> tuple[int, int]:
        return (480, 640) if position % 4 else (640, 480)


class Shards:
    """The shards of a store that holds all images in order."""

    def __init__(self, shard_rows: int) -> None:
        self.shard_rows = shard_rows

    def shard_of(self, key: RowKey) -> int:
        return ((key.image_id - 1) * len(VIEWS) + VIEWS.index(key.view)) // self.shard_rows


def plan(images: int, reader: Any, order: Any, batch: int) -> list[list[Item]]:
    """The batches of an epoch."""
    dataset: Any = Images(images)
    source = SampleSource(
        dataset=dataset, canvas=Canvas(256, 320), view_seed=0, grid=GFL.grid, assigner=GFL.assigner, region_spec=RegionSpec(),
        reader=reader,
    )  # fmt: skip
    return plan_epoch(source, np.arange(images), VIEWS, seed=0, epoch=0, batch=batch, shuffle=order)


def randomness(images: int, shard_rows: int, batch: int) -> dict[str, Any]:
    """Of both orders: pairs of a batch in one shard, and the mean distance of a pair as a share of the data set."""
    found: dict[str, Any] = {"rows_a_shard": shard_rows}
    for order in ORDERS:
        reader = Shards(shard_rows)
        started = time.process_time()
        batches = plan(images, reader, order, batch)
        seconds = time.process_time() - started
        same = pairs = far = 0.0
        for items in batches:
            shard = np.array([reader.shard_of(RowKey(p + 1, view)) for p, view in items])
            storage = np.array([p for p, _ in items])
            above = np.triu_indices(len(items), 1)
            same += (shard[:, None] == shard)[above].sum()
            far += np.abs(storage[:, None] - storage)[above].sum() / images
            pairs += len(above[0])
        found[order] = {
            "pairs_in_one_shard_percent": round(100 * same / pairs, 3),
            "mean_distance": round(far / pairs, 3),
            "plan_s": round(seconds, 2),
        }
    return found


def manifest_of(schema: StoreSchema, images: int) -> Manifest:
    """Of a teacher and a data set that are not there: nobody trains from the store."""
    return Manifest(
        teacher=TeacherRecord(model={"detector": "gfl", "backbone": "resnet18"}, weights_sha256="", ap=None, specs={}),
        teacher_run=TeacherRun(precision="fp32", micro_batch=8, device="cpu", threads=1, compile=None),
        dataset=DatasetRecord(annotations_sha256="", categories=(), num_images=images, split="train", left_out=()),
        class_order=(),
        views=VIEWS,
        view_seed=0,
        assigner=GFL.assigner.to_json(),
        regions=RegionSpec().to_json(),
        versions={},
        methods=(),
        method_options={},
        method_needs={},
        origin=Origin(data="", teacher=""),
        schema=schema,
        added_on={},
    )


def make_store(path: Path, images: int, shard_rows: int) -> None:
    """A store of random rows of about 40 kB."""
    needs = (Need("features", "all"), Need("cls_logits", "main"))
    specs = {"features": TensorSpec("cell", (128,)), "cls_logits": TensorSpec("anchor", (20,))}
    canvas = Canvas(96, 128)
    schema = StoreSchema(
        grid=GFL.grid,
        canvas=canvas,
        rows=images * len(VIEWS),
        shard_rows=shard_rows,
        tensors=plan_tensors(needs, specs),
    )
    create_store(path, manifest_of(schema, images), np.arange(1, images + 1))
    draw = np.random.default_rng(0)
    chunks: dict[str, list[bytes]] = {}
    for array in schema.layout():
        values = [draw.integers(0, 200, array.shape).astype(array.dtype) for _ in range(8)]
        if array.path == "entries/count":
            values = [np.array([20], np.int32)] * 8
        if array.path == "entries/index":
            values = [np.arange(len(values[0]), dtype=np.int32)] * 8
        if array.path == "entries/flag":
            values = [np.ones_like(values[0])] * 8
        chunks[array.path] = [pack_chunk(v, array) for v in values]
    writer = StoreWriter(path, schema)
    identity = next(array for array in schema.layout() if array.path == "row/identity")
    for shard in range(schema.num_shards):
        start, stop = schema.shard_range(shard)
        rows = {p: [c[k % 8] for k in range(start, stop)] for p, c in chunks.items()}
        keys = [RowKey(k // len(VIEWS) + 1, VIEWS[k % len(VIEWS)]) for k in range(start, stop)]
        records = [pack_identity(bytes(32), bytes(16), key, schema.version) for key in keys]
        rows[identity.path] = [pack_chunk(record, identity) for record in records]
        writer.write_chunks(shard, rows, Measured())


def drop_pages(files: list[Path]) -> None:
    """Ask the kernel to forget what it has of the store."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_bytes() -> int:
    """What this process has had read from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def reads(store: Path, images: int, batch: int, turns: int, cold: bool) -> dict[str, Any]:
    """Files opened a row, rows a second, and bytes from the disk a row, of both orders."""
    opened = 0
    real = open_shards

    def counting(storage: Any, keys: Any, chunks: int) -> Any:
        nonlocal opened
        opened += len(keys)
        return real(storage, keys, chunks)

    patched = patch.object(reading, "open_shards", counting)
    patched.start()
    files = [f for f in store.rglob("*") if f.is_file()]
    readers = {order: StoreReader(store) for order in ORDERS}
    plans = {order: plan(images, readers[order], order, batch) for order in ORDERS}
    rows = dict.fromkeys(ORDERS, 0)
    sums = {order: np.zeros(3) for order in ORDERS}
    for turn in range(turns):
        for order, reader in readers.items():
            if cold:
                drop_pages(files)
            before, disk, started = opened, read_bytes(), time.perf_counter()
            for items in plans[order][turn * TURN : (turn + 1) * TURN]:
                for position, view in items:
                    reader.read(RowKey(position + 1, view))
                    rows[order] += 1
            sums[order] += [opened - before, time.perf_counter() - started, read_bytes() - disk]
    patched.stop()
    return {
        order: {
            "files_opened_a_row": round(sums[order][0] / rows[order], 2),
            "rows_per_s": round(rows[order] / sums[order][1]),
            "disk_kB_a_row": round(sums[order][2] / rows[order] / 1000, 1),
        }
        for order in ORDERS
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=118287)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--stored", type=int, default=8192, help="images of the store that is read")
    parser.add_argument("--shard-rows", type=int, default=32)
    parser.add_argument("--turns", type=int, default=10)
    args = parser.parse_args()
    store = args.out / f"random-{args.stored}-{args.shard_rows}"
    if not store.exists():
        make_store(store, args.stored, args.shard_rows)
    size = sum(f.stat().st_size for f in store.rglob("*") if f.is_file())
    found = {
        "machine": hardware(),
        "images": args.images,
        "batch": args.batch,
        "randomness": [randomness(args.images, rows, args.batch) for rows in (256, 64, 16)],
        "store": {"rows": 2 * args.stored, "rows_a_shard": args.shard_rows, "kB_a_row": round(size / args.stored / 2000, 1)},
        "warm": reads(store, args.stored, args.batch, args.turns, cold=False),
        "cold": reads(store, args.stored, args.batch, args.turns, cold=True),
    }  # fmt: skip
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
