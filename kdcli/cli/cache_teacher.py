"""``kdcli cache-teacher``: fills a store, or says what it would take."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.cli import flags as f
from kdcli.cli.cache import store_info
from kdcli.cli.main import app
from kdcli.errors import OptionError, UsageError, nearest

if TYPE_CHECKING:
    from kdcli.engine.caching import Plan
    from kdcli.engine.estimate import Estimate
    from kdcli.engine.watch import Watcher
    from kdcli.engine.writing import Part
    from kdcli.options import CacheOptions


@app.command(name="cache-teacher")
def cache_teacher(
    data: f.Data = None,
    teacher: Annotated[str | None, typer.Option(help="Run folder or checkpoint of the teacher.")] = None,
    method: f.MethodList = None,
    out: Annotated[
        str | None, typer.Option(help="Store folder or URL; the same command again goes on after a kill.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split to cache (default train).")] = None,
    canvas: f.CanvasSize = None,
    views: f.Views = None,
    encoding: Annotated[str | None, typer.Option(help="default (8 bit where safe), compact, float16, lossless.")] = None,
    precision: Annotated[str | None, typer.Option(help="Teacher precision: fp32 (default) or bf16.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Images per forward pass (default 8).")] = None,
    shard_rows: Annotated[int | None, typer.Option(min=1, help="Rows a shard (default: 128 MB, at most 256).")] = None,
    min_teacher_ap: Annotated[float | None, typer.Option(help="Refuse a teacher below this AP on val.")] = None,
    device: f.Device = None, threads: f.Threads = None, workers: f.Workers = None, skip_bad: f.SkipBad = None,
    config: f.Config = None, set_: f.Set = None,
    shard: Annotated[
        str | None, typer.Option(help="Part I of N, e.g. 0/4: other processes write the others at the same time.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only print bytes and time, from a few images.")] = False,
    json: f.Json = False,
) -> int:  # fmt: skip
    """Run the teacher once and store what the methods read.

    Example: kdcli cache-teacher --data DATA --teacher runs/teacher --method ld,pfi --views identity,hflip --out STORE
    """
    from kdcli.cache.places import Folder, place_of
    from kdcli.cli.outputs import require_folder
    from kdcli.cli.watch import print_json, watching
    from kdcli.engine.caching import plan_store
    from kdcli.engine.estimate import estimate as make_estimate
    from kdcli.engine.estimate import require_room
    from kdcli.engine.writing import write_store
    from kdcli.options import layer, read_toml

    given = f.collect(
        data=data, teacher=teacher, method=method, split=split, canvas=canvas, views=views, encoding=encoding,
        precision=precision, micro_batch=micro_batch, shard_rows=shard_rows, min_teacher_ap=min_teacher_ap,
        device=device, threads=threads, workers=workers, skip_bad=skip_bad,
    )  # fmt: skip
    fields = layer(read_toml(config) if config else {}, given)
    options = _options(fields, set_ or [])
    if not out:
        raise UsageError("--out is missing: name the store folder, e.g. --out store")
    place = place_of(out)
    if isinstance(place, Folder) and not estimate:
        require_folder(place.path, "--out")
    part = _part(shard)
    with watching(part is None or shard is not None or part.index == 0) as watcher:
        plan = plan_store(options, watcher)
        found = make_estimate(plan, place) if estimate or not place.exists() else None
        if estimate:
            assert found is not None
            return _report_estimate(plan, found, watcher, json)
        if found is not None:
            require_room(found, place)
            watcher.note(_priced(found))
        written = write_store(plan, place, watcher, part)
        info = store_info(place)
        state = "complete" if info["complete"] else f"{info['shards_done']} of {info['shards']} shards are written"
        watcher.note(f"{out}: {state}, {info['rows']} rows ({written} written now), {info['bytes'] / 2**20:.1f} MB")
    if json:
        print_json(info)
    return 0


def _options(fields: dict[str, Any], set_: list[str]) -> CacheOptions:
    """Raises OptionError and UsageError for what is unknown or missing."""
    from kdcli.methods import find_methods
    from kdcli.options import CacheOptions, build, layer, parse_assignments

    known = find_methods(str(fields.get("method", ""))) if fields.get("method") else {}
    for table, values in parse_assignments(set_).items():
        if table not in known:
            raise OptionError(f"--set {table}.…: unknown table '{table}'{nearest(table, known)}")
        fields = layer(fields, {"methods": {table: values}})
    options = build(CacheOptions, fields)
    for flag, value in (("--data", options.data), ("--teacher", options.teacher), ("--method", options.method)):
        if not value:
            raise UsageError(f"{flag} is missing; see the example in `kdcli cache-teacher --help`")
    return options


def _part(shard: str | None) -> Part | None:
    """What ``--shard`` says, or torchrun; None for a process that writes alone."""
    from kdcli.engine.writing import Part

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if shard is None:
        return Part(rank, world) if world > 1 else None
    if world > 1:
        raise UsageError("--shard does not go with torchrun, which shares the work itself")
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not found or int(found[1]) >= int(found[2]):
        raise UsageError(f"--shard '{shard}': write I/N with I from 0 to N - 1, e.g. 0/4")
    return Part(int(found[1]), int(found[2]))


def _priced(found: Estimate) -> str:
    return (
        f"estimate: {found.rows} rows, {found.bytes_total / 2**20:.1f} MB on disk ({found.bytes_raw / 2**20:.1f} MB raw), "
        f"{found.seconds:.0f} s at {found.rows_per_s:.1f} rows/s"
        + ("" if found.free_bytes is None else f"; {found.free_bytes / 2**30:.1f} GB are free")
    )


def _report_estimate(plan: Plan, found: Estimate, watcher: Watcher, as_json: bool) -> int:
    from kdcli.cli.watch import print_json

    watcher.note(_priced(found))
    for path, size in found.bytes_by_array.items():
        watcher.note(f"  {path}: {size / 2**20:.2f} MB, {size / found.rows / 1000:.2f} kB a row")
    if as_json:
        print_json(dataclasses.asdict(found))
    return 0
