"""``kdcli cache-teacher``: fills a store, or says what it would take."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.cli import flags as f
from kdcli.cli.app import app
from kdcli.errors import UsageError
from kdcli.limits import MAX_BATCH, MAX_ROWS

if TYPE_CHECKING:
    from kdcli.engine.caching.estimate.estimate import Estimate
    from kdcli.engine.runtime.progress import ProgressReporter
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
    micro_batch: Annotated[
        int | None, typer.Option(min=1, max=MAX_BATCH, help="Images per forward pass (default 8).")
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option(min=1, max=MAX_ROWS, help="Rows a shard (default: 128 MB, at most 256).")
    ] = None,
    min_teacher_ap: Annotated[float | None, typer.Option(help="Refuse a teacher below this AP on val.")] = None,
    cache_images: Annotated[
        bool | None, typer.Option("--cache-images", help="Store the resized images too: no decoding in training.")
    ] = None,
    compile_: Annotated[
        bool | None, typer.Option("--compile", help="Compile the teacher: faster after a minute, last digits differ.")
    ] = None,
    device: f.Device = None, threads: f.Threads = None, workers: f.TeacherWorkers = None, skip_bad: f.SkipBad = None,
    clip_boxes: f.ClipBoxes = None, exif: f.Exif = None, config: f.Config = None, set_: f.Set = None,
    shard: Annotated[
        str | None, typer.Option(help="Part I of N, e.g. 0/4: other processes write the others at the same time.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only print bytes, time and break-even.")] = False,
    json: f.Json = False,
) -> int:  # fmt: skip
    """Run the teacher once and store what the methods read.

    Example: kdcli cache-teacher --data DATA --teacher runs/teacher --method ld,pfi --views identity,hflip --out STORE
    """
    from kdcli.api.caching import part_of, write
    from kdcli.cli.json_output import print_json
    from kdcli.cli.outputs import require_folder
    from kdcli.engine.caching.estimate.estimate import estimate as make_estimate
    from kdcli.engine.caching.plan import plan_store
    from kdcli.engine.runtime.memory import keep_freed_memory
    from kdcli.options import layer, read_toml
    from kdcli.report.progress import reporting
    from kdcli.store.storage.resolve import open_storage

    given = f.collect(
        data=data, teacher=teacher, method=method, split=split, canvas=canvas, views=views, encoding=encoding,
        precision=precision, micro_batch=micro_batch, shard_rows=shard_rows, min_teacher_ap=min_teacher_ap,
        cache_images=cache_images, compile=compile_, device=device, threads=threads, workers=workers, skip_bad=skip_bad,
        clip_boxes=clip_boxes, exif=exif,
    )  # fmt: skip
    fields = layer(read_toml(config) if config else {}, given)
    options = _options(fields, set_ or [])
    if not out:
        raise UsageError("--out is missing: name the store folder, e.g. --out store")
    storage = open_storage(out)
    if storage.folder is not None and not estimate:
        require_folder(storage.folder, "--out")
    part = part_of(shard)
    with reporting(part is None or shard is not None or part.index == 0) as reporter:
        plan = plan_store(options, reporter)
        keep_freed_memory(plan.teacher.device)
        if estimate:
            return _report_estimate(make_estimate(plan, storage, part), reporter, json)
        info = write(plan, storage, part, reporter)
    if json:
        print_json(info)
    return 0


def _options(fields: dict[str, Any], set_: list[str]) -> CacheOptions:
    """Raises OptionError and UsageError for what is unknown or missing."""
    from kdcli.methods.resolve import method_tables
    from kdcli.options import CacheOptions, build, layer, parse_assignments

    for table, values in method_tables(str(fields.get("method") or ""), parse_assignments(set_)).items():
        fields = layer(fields, {"methods": {table: values}})
    options = build(CacheOptions, fields)
    for flag, value in (("--data", options.data), ("--teacher", options.teacher), ("--method", options.method)):
        if not value:
            raise UsageError(f"{flag} is missing; see the example in `kdcli cache-teacher --help`")
    return options


def _report_estimate(found: Estimate, reporter: ProgressReporter, as_json: bool) -> int:
    from kdcli.cli.json_output import print_json
    from kdcli.report.estimate import paid_back, priced
    from kdcli.report.text import size

    reporter.message(priced(found))
    reporter.message(paid_back(found.break_even))
    for key, count in found.bytes_by_tensor.items():
        reporter.message(f"  {key}: {size(count)}, {size(count / found.rows)} a row")
    if as_json:
        print_json(dataclasses.asdict(found))
    return 0
