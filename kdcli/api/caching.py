"""Writing a store: what ``kdcli cache-teacher`` does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from kdcli.api.reporter import Progress, reporter_of
from kdcli.api.runs import plain
from kdcli.engine.caching.estimate.estimate import MARGIN, Estimate, estimate
from kdcli.engine.caching.plan import StorePlan, plan_store
from kdcli.engine.caching.write import Part, write_store
from kdcli.engine.runtime.distributed import started_as
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.errors import NoSpaceError, UsageError
from kdcli.options import CacheOptions, build
from kdcli.report.estimate import priced
from kdcli.report.text import size
from kdcli.store.info import store_info
from kdcli.store.storage.base import Storage
from kdcli.store.storage.resolve import open_storage


class CacheSettings(TypedDict, total=False):
    """Options of ``cache-teacher`` (docs/cli.md), with its defaults."""

    split: str
    canvas: str | None
    views: str
    view_seed: int
    encoding: Literal["default", "compact", "float16", "lossless"]
    precision: Literal["fp32", "bf16"]
    micro_batch: int
    threads: int | None
    device: str
    workers: int | None
    shard_rows: int | None
    min_teacher_ap: float
    compile: bool
    cache_images: bool
    skip_bad: bool
    clip_boxes: bool
    exif: Literal["auto", "apply", "ignore"]
    methods: Mapping[str, Mapping[str, Any]]  # options of each method: what --set ld.imitation=gi says


def cache_teacher(
    *, data: Path | str, teacher: Path | str, method: str | Sequence[str], out: Path | str, shard: str | None = None,
    progress: Progress = None, **settings: Unpack[CacheSettings],
) -> str:  # fmt: skip
    """Run the teacher once and store what the methods read, as ``kdcli cache-teacher`` does; returns the store's path.

    ``method``: ``"ld,pfi"`` or ``["ld", "pfi"]``. ``out``: folder or URL; a store that is there is gone on with.
    ``shard``: ``"I/N"``, the part of one of N processes. ``progress``: True for a bar on stderr, or a reporter.
    Raises KDError, as the command.

    One thing the command does beside this, since it changes the whole process: on a CPU it keeps the memory that a pass
    frees, and takes a fifth less time. A process that does nothing else may call
    ``kdcli.engine.runtime.memory.keep_freed_memory(torch.device("cpu"))`` first (docs/decisions, 18).
    """
    named = {"data": data, "teacher": teacher, "method": method}
    options = build(CacheOptions, plain({**named, **settings}))
    part, storage = part_of(shard), open_storage(out)
    with reporter_of(progress, part is None or shard is not None or part.index == 0) as reporter:
        write(plan_store(options, reporter), storage, part, reporter)
    return str(storage)


def write(plan: StorePlan, storage: Storage, part: Part | None, reporter: ProgressReporter) -> dict[str, Any]:
    """Write the store, or go on with it; what it holds then. Raises NoSpaceError before anything is written."""
    if not storage.exists():
        found = estimate(plan, storage, part)
        require_room(found, str(storage))
        reporter.message(priced(found))
    written = write_store(plan, storage, reporter, part)
    info = store_info(storage)
    state = "complete" if info["complete"] else f"{info['shards_done']} of {info['shards']} shards are written"
    reporter.message(f"{storage}: {state}, {info['rows']} rows ({written} written now), {size(info['bytes'])}")
    return info


def part_of(shard: str | None) -> Part | None:
    """What ``--shard`` says, or torchrun; None for a process that writes alone."""
    rank, world = started_as()
    if shard is None:
        return Part(rank, world) if world > 1 else None
    if world > 1:
        raise UsageError("--shard does not go with torchrun, which shares the work itself")
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard)
    if not found or int(found[1]) >= int(found[2]):
        raise UsageError(f"--shard '{shard}': write I/N with I from 0 to N - 1, e.g. 0/4")
    return Part(int(found[1]), int(found[2]))


def require_room(found: Estimate, out: str) -> None:
    """Raises NoSpaceError (exit 5) when the disk of ``out`` cannot hold the store; nothing has been written then."""
    wanted = found.bytes_total * MARGIN
    if found.free_bytes is not None and wanted > found.free_bytes:
        raise NoSpaceError(
            f"the store needs about {size(wanted)}, the disk of '{out}' has {size(found.free_bytes)} free; "
            "free some space, choose another --out, fewer --views or methods with sparse needs (ld, rm)"
        )
