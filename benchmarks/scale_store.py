"""A simulated data set of COCO's size and the store of it, for ``scale.py``: real boxes' statistics, random teacher values.

A pool of distinct images is drawn: sizes, boxes, the regions of both views as kdcli computes them, and random values at
the shapes these have. Every image of the data set is one of the pool under an id of its own, so that the store is the
one that ``cache-teacher`` would write for these files: same plan, same manifest, same rows, checksums and journal.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kdcli.classes import ClassList
from kdcli.detectors.build import ModelSpec, build_detector
from kdcli.detectors.weights import export
from kdcli.engine.caching.plan import StorePlan, plan_store
from kdcli.engine.caching.write import Packed, Part, encode_row
from kdcli.engine.loading.samples import Sample
from kdcli.engine.runtime.progress import NullReporter
from kdcli.files import atomic_save
from kdcli.options import CacheOptions
from kdcli.store.batch_buffers import collate_arrays
from kdcli.store.encoding_error import ErrorMeter, Measured
from kdcli.store.row_identity import pack_identity
from kdcli.store.schema import row_tensor
from kdcli.store.shards import pack_chunk
from kdcli.store.writer import StoreWriter, create_store
from kdcli.structures import RowKey
from kdcli.tensors import BOX_DISTRIBUTION, CLS_LOGITS

TRAIN2017_IMAGES = 118_287
LAST_ID = 581_929  # the largest image id of train2017
CLASSES = 80
# height, width, share. Of these and of the numbers below: 92 images and 597 boxes of COCO, two views of GFL at 800x1344 had
# 835 entries and 73 kB a row there
SIZES = ((480, 640, 0.36), (427, 640, 0.32), (640, 427, 0.12), (640, 480, 0.12), (375, 500, 0.08))
EMPTY_SHARE = 1021 / TRAIN2017_IMAGES
BOXES_MEAN = 7.27  # train2017: 860,001 boxes
MOST_BOXES = 93
LOG_SIDE, LOG_ASPECT = (4.03, 1.15), (-0.17, 0.77)  # mean and deviation: of sqrt(w h) in pixels, of w / h
KILLED_AT = 0.9  # share of the shards
END = 500  # shards at the beginning and at the end whose writing is compared
WRITERS = 4  # processes: one alone mostly waits for the disk to say that a file is safe
Boxes = NDArray[np.float64]  # [G, 4] xywh image pixels


def draw_image(number: int) -> tuple[int, int, Boxes, NDArray[np.int64]]:
    """Height, width, boxes and labels (0..79) of an image of the pool."""
    rng = np.random.default_rng([1, number])
    height, width, _ = SIZES[rng.choice(len(SIZES), p=[share for _, _, share in SIZES])]
    mean = BOXES_MEAN / (1 - EMPTY_SHARE)  # of a geometric distribution from 1 up: its quantiles are COCO's
    count = 0 if rng.random() < EMPTY_SHARE else min(MOST_BOXES, int(rng.geometric(1 / mean)))
    side, aspect = np.exp(rng.normal(*LOG_SIDE, count)), np.exp(rng.normal(*LOG_ASPECT, count))
    w = np.clip(side * np.sqrt(aspect), 2, width)
    h = np.clip(side / np.sqrt(aspect), 2, height)
    x, y = rng.random(count) * (width - w), rng.random(count) * (height - h)
    boxes = np.floor(np.stack([x, y, w, h], axis=1) * 100) / 100  # two decimals, as in COCO's file
    return height, width, boxes, rng.integers(0, CLASSES, count)


def make_data(root: Path, images: int, pool: int) -> None:
    """``images`` images under ``root`` in COCO layout, split train: links to the files of the pool."""
    (root / "train").mkdir(parents=True)
    (root / "pool").mkdir()
    (root / "annotations").mkdir()
    drawn = [draw_image(number) for number in range(pool)]
    for number, (height, width, _, _) in enumerate(drawn):
        picture = np.full((height, width, 3), number % 256, np.uint8)
        picture[..., 1] = np.linspace(0, 255, width, dtype=np.uint8)
        Image.fromarray(picture).save(root / "pool" / f"{number}.jpg", quality=80)
    ids = np.sort(np.random.default_rng(0).permutation(max(images, LAST_ID))[:images] + 1)
    categories = ",".join(f'{{"id":{k + 1},"name":"class {k}"}}' for k in range(CLASSES))
    # written piece by piece: all of it as objects would take 1 GB
    with open(root / "annotations" / "train.json", "w") as file:
        file.write(f'{{"categories":[{categories}],"images":[')
        for position, image_id in enumerate(ids.tolist()):
            name = f"{image_id:012d}.jpg"
            os.link(root / "pool" / f"{position % pool}.jpg", root / "train" / name)
            record = {"id": image_id, "file_name": name}
            record |= {"height": drawn[position % pool][0], "width": drawn[position % pool][1]}
            file.write(("," if position else "") + json.dumps(record))
        file.write('],"annotations":[')
        number = 0
        for position, image_id in enumerate(ids.tolist()):
            _, _, boxes, labels = drawn[position % pool]
            for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
                record = {"id": number + 1, "image_id": image_id, "category_id": label + 1, "bbox": box}
                record |= {"area": box[2] * box[3], "iscrowd": 0}
                file.write(("," if number else "") + json.dumps(record))
                number += 1
        file.write("]}")


def make_teacher(file: Path, canvas: str) -> None:
    """A GFL with COCO's number of classes and random weights; it is never run."""
    torch.manual_seed(0)
    spec = ModelSpec("gfl", "shufflenet_v2_x0_5", CLASSES, fpn_channels=32, tower_convs=1)
    classes = ClassList.numbered(f"class {k}" for k in range(CLASSES))
    atomic_save(export(build_detector(spec), classes, canvas, {}), file)


def make_plan(folder: Path, method: str, shard_rows: int | None) -> StorePlan:
    """The plan of the store, from the files under ``folder``: what ``cache-teacher`` makes first."""
    options = CacheOptions(
        data=str(folder / "data"),
        teacher=str(folder / "teacher.pt"),
        method=method,
        shard_rows=shard_rows,
        device="cpu",
        threads=1,  # part of what a store is: the same in every process
    )
    return plan_store(options, NullReporter())


def random_values(plan: StorePlan, sample: Sample, rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Teacher tensors by ``Need.key`` at the entries of ``sample``, which compress as those of a network do."""
    assert sample.entries is not None
    values = {}
    for tensor in plan.schema.tensors:
        shape = (int(sample.entries.select(tensor.need.region).sum()), *tensor.dims)
        if tensor.need.name == BOX_DISTRIBUTION:  # 8-bit codes: 0.95 of their size
            value = rng.normal(0, 0.5, shape)
        elif tensor.need.name == CLS_LOGITS:  # float16: 0.3 to 0.4
            value = rng.normal(-4.6, 0.03, shape)
        else:
            value = rng.random(shape)
        values[tensor.need.key] = value.astype(np.float32)
    return values


def make_pool(plan: StorePlan, size: int) -> tuple[list[Packed], dict[str, float]]:
    """Packed rows of the first ``size`` images, both views of each, in row order; and what a row of them is on average."""
    layout = plan.schema.layout()
    packed, sums = [], {"entries": 0, "positives": 0, "boxes": 0, "raw_bytes": 0, "chunk_bytes": 0}
    for row in range(size * len(plan.views)):
        sample = plan.source.load(plan.item(row))
        value = random_values(plan, sample, np.random.default_rng([2, row]))
        arrays = encode_row(plan, sample, value)
        meter = ErrorMeter()
        decoded = plan.schema.decode(collate_arrays([arrays], layout), plan.needs)
        for key, exact in value.items():
            meter.add(key, exact, row_tensor(decoded[key]))
        chunks = {a.path: pack_chunk(arrays[a.path], a) for a in layout}
        raw = sum(v.nbytes for v in arrays.values())
        packed.append(Packed(chunks, raw, meter.sums, {}))
        assert sample.entries is not None
        sums["entries"] += len(sample.entries.index)
        sums["positives"] += int(sample.entries.select("main").sum())
        sums["boxes"] += len(sample.boxes)
        sums["raw_bytes"] += raw
        sums["chunk_bytes"] += sum(len(c) for c in chunks.values())
    return packed, {name: total / len(packed) for name, total in sums.items()}


def create(plan: StorePlan, store: Path) -> None:
    """The empty store."""
    create_store(store, plan.manifest, plan.source.dataset.annotations.image_ids[plan.positions])


def write(plan: StorePlan, store: Path, pool: list[Packed], part: int = 0, parts: int = 1) -> None:
    """Write every shard of a part that is missing; all rows are compressed already."""
    writer = StoreWriter(store, plan.schema)
    done = writer.done()
    layout = [a.path for a in plan.schema.layout()]
    rows = [p.chunks for p in pool]
    for shard in (s for s in Part(part, parts).shards(plan.schema.num_shards) if s not in done):
        numbers = [row % len(rows) for row in range(*plan.schema.shard_range(shard))]
        meter = ErrorMeter()
        for number in numbers:
            meter.join(pool[number].encoding)
        chunks = {path: [rows[number][path] for number in numbers] for path in layout}
        chunks["row/identity"] = [own_identity(plan, row) for row in range(*plan.schema.shard_range(shard))]
        writer.write_chunks(shard, chunks, Measured(encoding=meter.sums))


def own_identity(plan: StorePlan, row: int) -> bytes:
    """The packed identity record of a row: it names its image and view, so no other row can lend it."""
    position, view = plan.item(row)
    key = RowKey(plan.source.dataset.image_id(position), view)
    array = next(a for a in plan.schema.layout() if a.path == "row/identity")
    return pack_chunk(pack_identity(bytes(32), bytes(16), key, plan.schema.version), array)


def write_and_kill(plan: StorePlan, store: Path, pool: list[Packed]) -> float:
    """Write in processes that are killed at ``KILLED_AT``; returns the seconds."""
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write, args=(plan, store, pool, k, WRITERS)) for k in range(WRITERS)]
    began = time.perf_counter()
    for writer in writers:
        writer.start()
    while len(os.listdir(store / "journal")) < KILLED_AT * plan.schema.num_shards:
        if not all(writer.is_alive() for writer in writers):
            raise SystemExit("a writer died")
        time.sleep(0.5)
    for writer in writers:
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
    return time.perf_counter() - began


def write_times(store: Path) -> dict[str, float]:
    """Mean time between the journal entries of the first shards and before the kill, milliseconds."""
    times = sorted(file.stat().st_mtime_ns / 1e6 for file in (store / "journal").glob("*.json"))
    steps = [b - a for a, b in itertools.pairwise(times[: int(KILLED_AT * len(times))])]
    return {"shard_ms_first": statistics.mean(steps[:END]), "shard_ms_last": statistics.mean(steps[-END:])}


@contextmanager
def journal_without(entries: Sequence[Path]) -> Iterator[None]:
    """The store as it is when it is killed before these entries."""
    for file in entries:
        file.rename(file.with_name(f".{file.name}"))  # hidden files are no entries
    try:
        yield
    finally:
        for file in entries:
            file.with_name(f".{file.name}").rename(file)


def drop_pages(folder: Path) -> None:
    """Have the system forget the contents of every file below ``folder``."""
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def tree(store: Path) -> dict[str, Any]:
    """What a store is for the file system: files, folders, bytes in them, and bytes of the blocks that hold them."""
    found = {"files": 0, "folders": 0, "bytes": 0, "allocated_bytes": 0}
    for folder, _, names in os.walk(store):
        found["folders"] += 1
        found["allocated_bytes"] += os.stat(folder).st_blocks * 512
        for name in names:
            stat = os.stat(os.path.join(folder, name))
            found["files"] += 1
            found["bytes"] += stat.st_size
            found["allocated_bytes"] += stat.st_blocks * 512
    return found
