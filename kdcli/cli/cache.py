"""``kdcli cache info|verify|bench|show``: look into a store."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcli.cli import flags as f
from kdcli.cli.app import app
from kdcli.errors import UsageError
from kdcli.limits import MAX_BATCH, MAX_ROWS, MAX_WORKERS
from kdcli.store.info import store_info

cache = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look into a store, or change it.\n\nExample: kdcli cache info STORE",
)
app.add_typer(cache, name="cache")

CHECKS = {  # of a format version, what verify can say of it
    1: "crc32c is right; rows that changed places have the same one: write the store again for a digest of every byte",
    2: "checksum is right",
}
Store = Annotated[str, typer.Argument(help="Store folder, or s3://, gs://, az:// URL.", show_default=False)]


@cache.command()
def info(store: Store, json: f.Json = False) -> int:
    """Show what a store holds: teacher, data, views, tensors, bytes, and the measured error of each encoding.

    Example: kdcli cache info STORE --json
    """
    from rich.table import Table
    from rich.text import Text

    from kdcli.cli.json_output import print_json
    from kdcli.report.console import human_console, say
    from kdcli.report.text import plain
    from kdcli.store.image_codec import PIXELS
    from kdcli.store.manifest import read_manifest

    found = store_info(store)
    if json:
        print_json(found)
        return 0
    console = human_console()
    manifest = read_manifest(store)
    teacher, run, dataset = manifest.teacher, manifest.teacher_run.to_json(), manifest.dataset
    ap = "not measured" if teacher.ap is None else f"{teacher.ap:.1f} AP"
    lines = [
        f"store {store}: {'complete' if found['complete'] else 'INCOMPLETE, run cache-teacher again to finish it'}, "
        f"{found['shards_done']} of {found['shards']} shards, {found['rows']} rows, "
        f"{found['bytes'] / 2**20:.1f} MB, {found['bytes'] / max(1, found['rows']) / 1000:.1f} kB a row",
        f"teacher {teacher.name} ({ap}), weights {teacher.weights_sha256[:12]}, "
        + ", ".join(f"{k} {v}" for k, v in run.items() if v is not None),
        f"data {dataset.annotations_sha256[:12]}, {dataset.num_images} images, canvas {manifest.schema.canvas}, "
        f"views {', '.join(manifest.views)}",
    ]
    for key, added in manifest.added_on.items():
        where = ", ".join(f"{name} {value}" for name, value in added.to_json().items())
        lines.append(f"added later on another device: {key}, {where}")
    say(console, *lines)
    measured = any(tensor["precision_error"] for tensor in found["tensors"].values())
    precision = [f"{manifest.teacher_run.precision} teacher"] if measured else []
    table = Table(
        "tensor", "encoding", "bytes", "rms error", "relative", "worst", *precision, box=None, pad_edge=False
    )  # fmt: skip
    for key, tensor in found["tensors"].items():
        error, other = tensor["error"], tensor["precision_error"]
        numbers = ["-" if error is None else f"{error[k]:.2g}" for k in ("rms", "relative", "worst")]
        if measured:
            numbers.append("-" if other is None else f"{other['relative']:.2g}")
        table.add_row(Text(plain(key)), Text(plain(tensor["encoding"])), f"{tensor['bytes']:,}", *numbers)
    if found["images"]:
        table.add_row(PIXELS, found["images"]["encoding"], f"{found['images']['bytes']:,}")
    console.print(table)
    return 0


@cache.command()
def verify(
    store: Store,
    teacher: Annotated[str | None, typer.Option(help="Run this teacher again on some rows.")] = None,
    data: Annotated[str | None, typer.Option(help="Data set of --teacher (default: where the store is from).")] = None,
    rows: Annotated[int, typer.Option(min=1, max=MAX_ROWS, help="Rows for --teacher.")] = 32,
    device: Annotated[
        str | None, typer.Option(help="Device for --teacher (default: the one that wrote the store).")
    ] = None,
    json: f.Json = False,
) -> int:
    """Check every checksum and, with a teacher, run it again and compare.

    Example: kdcli cache verify STORE --teacher runs/teacher --data DATA --rows 32
    """
    from kdcli.cli.json_output import print_json
    from kdcli.engine.caching.verify import plan_of_store, verify_checksums, verify_teacher
    from kdcli.report.progress import ConsoleReporter
    from kdcli.store.manifest import read_manifest

    if teacher is None and (data is not None or device is not None):
        raise UsageError("--data and --device are for running the teacher again: add --teacher RUN, or leave them out")
    with ConsoleReporter() as reporter:
        files, size = verify_checksums(store, reporter)
        manifest = read_manifest(store)
        version = manifest.schema.version
        result: dict[str, Any] = {"version": version, "files": files, "bytes": size}
        result |= {"rows_compared": 0, "differences": {}}
        if teacher:
            plan = plan_of_store(store, data or manifest.origin.data, teacher, device, reporter)
            result["rows_compared"], result["differences"] = verify_teacher(plan, store, rows, reporter)
        reporter.message(
            f"{store}: format version {version}, {files} shard files, {size / 2**20:.1f} MB, every {CHECKS[version]}"
        )
        for key, error in result["differences"].items():
            reporter.message(
                f"  {key}: rms {error['rms']:.2g}, relative {error['relative']:.2g}, worst {error['worst']:.2g}"
            )
    if json:
        print_json(result)
    return 0


@cache.command()
def bench(
    store: Store,
    method: f.ReadMethods = None,
    workers: Annotated[str | None, typer.Option(help="Numbers of data workers, e.g. 0,1,2.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Rows a batch.")] = 16,
    rows: Annotated[int, typer.Option(min=1, max=MAX_ROWS, help="Rows to read for each number.")] = 2000,
    step_ms: Annotated[
        float | None, typer.Option(min=0.001, max=1e9, help="A training step, for the forecast.")
    ] = None,
    json: f.Json = False,
) -> int:
    """Read random rows with some numbers of data workers: rows/s, MB/s, and the share of a step that would wait.

    Example: kdcli cache bench STORE --method ld --workers 0,1,2 --batch 16 --step-ms 250
    """
    from rich.table import Table

    from kdcli.cli.json_output import print_json
    from kdcli.engine.caching.bench import bench as run_bench
    from kdcli.engine.caching.bench import default_workers
    from kdcli.engine.caching.edit import needs_of
    from kdcli.report.console import human_console
    from kdcli.report.progress import ConsoleReporter

    try:
        numbers = [int(n) for n in workers.split(",")] if workers is not None else default_workers()
    except ValueError as error:
        raise UsageError(f"--workers '{workers}': write whole numbers, e.g. 0,1,2") from error
    if not 0 <= min(numbers) <= max(numbers) <= MAX_WORKERS:
        raise UsageError(f"--workers '{workers}': a number of processes is from 0 to {MAX_WORKERS}")
    with ConsoleReporter() as reporter:
        found = run_bench(store, needs_of(store, method) if method else None, numbers, batch, rows, reporter)
    if json:
        print_json(
            {
                "speeds": [
                    {
                        **dataclasses.asdict(s),
                        "rows_per_s": s.rows_per_s,
                        "wait_percent": None if step_ms is None else s.wait_percent(batch, step_ms / 1000),
                    }
                    for s in found
                ]
            }
        )
        return 0
    table = Table("workers", "rows/s", "MB/s", "waiting", box=None, pad_edge=False)
    for speed in found:
        wait = "-" if step_ms is None else f"{speed.wait_percent(batch, step_ms / 1000):.1f} %"
        table.add_row(str(speed.workers), f"{speed.rows_per_s:,.0f}", f"{speed.megabytes / speed.seconds:,.1f}", wait)
    human_console().print(table)
    return 0


@cache.command()
def show(
    store: Store,
    image: Annotated[int, typer.Argument(help="Image id of the annotation file.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    data: Annotated[
        str | None, typer.Option(help="Data set folder (default: where the store was written from).")
    ] = None,
    view: Annotated[str | None, typer.Option(help="View (default: the store's first).")] = None,
) -> int:
    """Draw one row: the view with its boxes, the positives, the VLR, and the teacher's boxes.

    Example: kdcli cache show STORE 17 --out row.png
    """
    from kdcli.cli.outputs import require_file
    from kdcli.engine.caching.show import read_for_show
    from kdcli.report.draw import save_png
    from kdcli.report.row import draw_row

    require_file(out, "--out", ".png")
    picture = draw_row(read_for_show(store, data, image, view))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_png(picture, out)
    return 0
