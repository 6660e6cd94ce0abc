"""``kdcli methods``, ``kdcli models`` and ``kdcli version``."""

from __future__ import annotations

from typing import Any

from kdcli.cli import flags as f
from kdcli.cli.main import app


@app.command()
def methods(json: f.Json = False) -> int:
    """List the distillation methods: what they need from a teacher, where they work, their options.

    Example: kdcli methods --json
    """
    from rich.table import Table

    from kdcli.cli.watch import print_json
    from kdcli.detectors.build import DETECTORS, ModelSpec, build_detector
    from kdcli.methods import METHODS
    from kdcli.methods.base import method_options
    from kdcli.report.console import human_console

    given = {d: set(build_detector(ModelSpec(d, "shufflenet_v2_x0_5", 2, 32, 1)).specs()) for d in DETECTORS}
    rows: list[dict[str, Any]] = []
    for name, method in METHODS.items():
        wanted = {"cls_logits" if n.name == "rank" else n.name for n in method.needs}
        rows.append(
            {
                "method": name,
                "title": method.title,
                "needs": [n.key for n in method.needs],
                "detectors": [d for d, names in given.items() if wanted <= names],
                "options": {o: p.default for o, p in method_options(method).items()},
            }
        )
    if json:
        print_json({"methods": rows})
        return 0
    table = Table("method", "teacher tensors", "detectors", "options (--set METHOD.OPTION=VALUE)", "source")
    for row in rows:
        options = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        table.add_row(row["method"], "\n".join(row["needs"]), ", ".join(row["detectors"]), options, row["title"])
    human_console().print(table)
    return 0


@app.command()
def models(json: f.Json = False) -> int:
    """List the detectors and backbones that --model takes.

    Example: kdcli models
    """
    from kdcli.cli.watch import print_json
    from kdcli.detectors.build import model_names
    from kdcli.report.console import human_console

    if json:
        print_json({"models": model_names()})
    else:
        human_console().print("\n".join(model_names()), markup=False)
    return 0


@app.command()
def version() -> int:
    """Print the version.

    Example: kdcli version
    """
    from kdcli import __version__

    print(__version__)
    return 0
