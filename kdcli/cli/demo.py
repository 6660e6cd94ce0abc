"""``kdcli demo``: the whole product on a drawn data set, on a CPU, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdcli.cli import flags as f
from kdcli.cli.app import app


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("kdcli-demo"),
    overwrite: f.Overwrite = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few images and epochs: shows the stages, not the gain.")
    ] = False,
    json: f.Json = False,
) -> int:
    """Shapes -> teacher -> cache -> baseline and distilled students -> comparison, on a CPU, in minutes.

    Example: kdcli demo --out demo
    """
    import time

    from kdcli.cli.json_output import print_json
    from kdcli.demo import clear_folder, run_demo
    from kdcli.report.console import show_comparison
    from kdcli.report.html import gist
    from kdcli.report.progress import ConsoleReporter

    clear_folder(out, overwrite=overwrite)
    started = time.perf_counter()
    with ConsoleReporter() as reporter:
        comparison = run_demo(out, quick=quick, reporter=reporter)
        show_comparison(reporter.console, comparison)
        reporter.message(gist(comparison))
        reporter.message(f"report    {out / 'report.html'}")
        reporter.message(f"drawings  {out / 'detections.png'}  {out / 'row.png'}  {out / 'plots'}")
        reporter.message(f"it took {time.perf_counter() - started:.0f} s")
    if json:
        print_json({"seconds": time.perf_counter() - started, "comparison": comparison.to_json()})
    return 0
