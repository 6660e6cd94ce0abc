"""``kdcli cache add|prune|merge``: change a finished store."""

from __future__ import annotations

from typing import Annotated

import typer

from kdcli.cli import flags as f
from kdcli.cli.cache import Store, cache
from kdcli.errors import UsageError
from kdcli.store.info import store_info


@cache.command()
def add(
    store: Store,
    method: f.MethodList = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher (default: where the store was written from).")] = None,
    data: Annotated[str | None, typer.Option(help="Data set (default: where the store was written from).")] = None,
    encoding: Annotated[str, typer.Option(help="Of the new tensors: default, compact, float16, lossless.")] = "default",
    cache_images: Annotated[
        bool, typer.Option("--cache-images", help="Add the resized images, so that training opens no image file.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Device for the teacher (default: the one that wrote the store).")
    ] = None,
    set_: f.Set = None,
    json: f.Json = False,
) -> int:
    """Add what other methods read, or the images. The teacher runs again; what is there stays. Killed, the same command
    goes on.

    Example: kdcli cache add STORE --method bckd
    """
    from kdcli.cli.json_output import print_json
    from kdcli.engine.caching.add import add as add_tensors
    from kdcli.engine.runtime.device import pick_device
    from kdcli.engine.runtime.memory import keep_freed_memory
    from kdcli.methods.resolve import method_tables
    from kdcli.options import parse_assignments
    from kdcli.report.progress import ConsoleReporter

    if not method and not cache_images:
        raise UsageError("name what to add: --method bckd, or --cache-images")
    settings = method_tables(method or "", parse_assignments(set_ or []))
    keep_freed_memory(pick_device(device or "auto"))
    with ConsoleReporter() as reporter:
        new = add_tensors(
            store, data, teacher, method or "", settings, encoding, reporter, images=cache_images, device=device
        )
        found = store_info(store)
        if new:
            reporter.message(f"{store}: {', '.join(new)} added, {found['bytes'] / 2**20:.1f} MB now")
    if json:
        print_json({"added": new, **found})
    return 0


@cache.command()
def prune(
    store: Store,
    tensor: Annotated[list[str] | None, typer.Option(help="Tensor to drop, as `cache info` names it.")] = None,
    view: Annotated[list[str] | None, typer.Option(help="View to leave out of a copy; needs --out.")] = None,
    out: Annotated[str | None, typer.Option(help="Where the copy without the views goes.")] = None,
    json: f.Json = False,
) -> int:
    """Drop tensors from a store, or copy it without some views. Killed, the same command goes on.

    Example: kdcli cache prune STORE --tensor features@all
    """
    from kdcli.cli.json_output import print_json
    from kdcli.engine.caching.edit import prune_tensors, prune_views
    from kdcli.report.progress import ConsoleReporter

    if bool(tensor) == bool(view):
        raise UsageError("prune takes either --tensor KEY (in place) or --view VIEW with --out COPY")
    if bool(view) != (out is not None):
        raise UsageError("--out goes with --view: rows cannot be taken out in place")
    with ConsoleReporter() as reporter:
        if view:
            assert out is not None
            rows = prune_views(store, view, out, reporter)
            reporter.message(f"{out}: {rows} rows, without {', '.join(view)}; delete '{store}' if it is not needed")
        else:
            dropped = prune_tensors(store, tensor or [], reporter)
            reporter.message(f"{store}: {', '.join(dropped) or 'what a killed command left'} dropped")
        found = store_info(out or store)
    if json:
        print_json(found)
    return 0


@cache.command()
def merge(
    stores: Annotated[list[str], typer.Argument(help="Stores of one teacher, canvas and method list.")],
    out: Annotated[str, typer.Option(help="Store to make; the same command goes on after a kill.")],
    data: Annotated[
        str | None, typer.Option(help="Data set with all images, when each store had an annotation file of its own.")
    ] = None,
    json: f.Json = False,
) -> int:
    """Join stores that hold other views, or other images, into a new one. Nothing is computed again.

    Example: kdcli cache merge store-identity store-hflip --out store
    """
    from kdcli.cli.json_output import print_json
    from kdcli.engine.caching.edit import merge as merge_stores
    from kdcli.report.progress import ConsoleReporter

    if len(stores) < 2:
        raise UsageError("merge needs at least two stores")
    with ConsoleReporter() as reporter:
        rows = merge_stores(stores, out, data, reporter)
        reporter.message(f"{out}: {rows} rows of {len(stores)} stores")
    if json:
        print_json(store_info(out))
    return 0
