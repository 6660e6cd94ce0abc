"""``cache-teacher --estimate``: bytes and time from the annotations and a few real images, before anything is written."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from kdcli.cache.places import Folder, Where, place_of
from kdcli.cache.writer import StoreWriter, create_store
from kdcli.engine.caching import Plan, encode_row, teacher_rows
from kdcli.engine.samples import Sample, orientation
from kdcli.errors import NoSpaceError

PROBE_ROWS = 16  # real images that are run through the teacher, encoded and compressed
MARGIN = 1.1  # the rows probed are few: ask for 10 % more room than they say


@dataclass(frozen=True)
class Estimate:
    """What a store will take."""

    rows: int
    bytes_total: int  # compressed, on disk
    bytes_by_array: dict[str, int]
    bytes_raw: int  # before compression, padding not counted
    seconds: float
    rows_per_s: float
    free_bytes: int | None  # None: an object store, which has no end


def estimate(plan: Plan, out: Where) -> Estimate:
    """Run a few evenly spaced rows through everything but the final place, and scale up."""
    step = max(1, plan.schema.rows // PROBE_ROWS)
    items = [plan.item(r) for r in range(0, plan.schema.rows, step)][:PROBE_ROWS]
    samples: list[Sample] = [plan.source.load(i) for i in items]
    groups: dict[str, list[Sample]] = {}
    for item, sample in zip(items, samples, strict=True):
        groups.setdefault(str(orientation(plan.source, item).size), []).append(sample)
    for group in groups.values():  # the first pass of a network is slower: not counted
        teacher_rows(plan, group[: plan.forward.micro_batch])
    started = time.perf_counter()
    rows = []
    for item in items:  # decoding is in the time too
        plan.source.load(item)
    for group in groups.values():
        values = teacher_rows(plan, group)
        rows += [encode_row(plan, sample, value) for sample, value in zip(group, values, strict=True)]
    schema = replace(plan.schema, rows=len(rows), shard_rows=min(plan.schema.shard_rows, len(rows)))
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "probe"
        create_store(store, schema, {"format": "kdcli.store"}, plan.source.dataset.annotations.image_ids[:0])
        writer = StoreWriter(store, schema)
        for shard in range(schema.num_shards):
            start, stop = schema.shard_range(shard)
            writer.write_shard(shard, rows[start:stop], {})
        seconds = time.perf_counter() - started
        by_array = {
            array.path: sum(f.stat().st_size for f in (store / array.path / "c").rglob("*") if f.is_file())
            for array in schema.layout()
        }
    scale = plan.schema.rows / len(rows)
    raw = sum(value.nbytes for row in rows for value in row.values())
    return Estimate(
        rows=plan.schema.rows,
        bytes_total=int(sum(by_array.values()) * scale),
        bytes_by_array={k: int(v * scale) for k, v in by_array.items()},
        bytes_raw=int(raw * scale),
        seconds=seconds * scale,
        rows_per_s=len(rows) / seconds,
        free_bytes=free_bytes(out),
    )


def require_room(found: Estimate, out: Where) -> None:
    """Raises NoSpaceError (exit 5) when the disk of ``out`` cannot hold the store; nothing has been written then."""
    wanted = int(found.bytes_total * MARGIN)
    if found.free_bytes is not None and wanted > found.free_bytes:
        raise NoSpaceError(
            f"the store needs about {_size(wanted)}, the disk of '{out}' has {_size(found.free_bytes)} free; "
            " free some space, choose another --out, fewer --views or methods with sparse needs (ld, rm)"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GB" if count >= 2**30 else f"{count / 2**20:.2f} MB"


def free_bytes(where: Where) -> int | None:
    """Free bytes on the disk that a folder is or will be on; None for an object store."""
    place = place_of(where)
    if not isinstance(place, Folder):
        return None
    folder = place.path.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
