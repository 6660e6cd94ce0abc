"""``kdcli compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdcli.cli import flags as f
from kdcli.cli.app import app


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold runs.", show_default=False)],
    baseline: Annotated[Path | None, typer.Option(help="The run whose group is the baseline.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained HTML file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for PNG plots.")] = None,
    fail_if_worse: Annotated[
        bool, typer.Option("--fail-if-worse", help="Exit 6 if a run is worse or not comparable.")
    ] = False,
    json: f.Json = False,
) -> int:
    """Compare runs: mean, standard deviation and 95 % interval over seeds, difference to the baseline, costs.

    Example: kdcli compare runs --html report.html --plots plots
    """
    from kdcli.cli.json_output import print_json
    from kdcli.cli.outputs import require_file, require_folder
    from kdcli.report.compare import compare as make_comparison
    from kdcli.report.compare import load_runs
    from kdcli.report.console import human_console, say, show_comparison
    from kdcli.report.gates import require_no_worse
    from kdcli.report.html import write_html
    from kdcli.report.plots import write_plots

    if html is not None:
        require_file(html, "--html")
    if plots is not None:
        require_folder(plots, "--plots")
    comparison = make_comparison(load_runs(runs), baseline)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        write_html(comparison, html)
    if plots is not None:
        write_plots(comparison, plots)
    if json:
        print_json(comparison.to_json())
        say(human_console(), *(f"left out: {run.path}: {run.problem}" for run in comparison.unfinished))
    else:
        show_comparison(human_console(), comparison)
    if fail_if_worse:
        require_no_worse(comparison)
    return 0
