"""The table of stores.py, and what its numbers say about the targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stores_formats import FORMATS

TITLES = {
    "plain": "plain training",
    "live": "live teacher",
    "kdcli": "kdcli store",
    "zarr": "the same store, zarr-python",
    **{kind: f.title for kind, f in FORMATS.items()},
}
COLUMNS = (  # {clock}: by the clock or by processor time, whichever is comparable
    ("kB a row", "kb_a_row", "{:,.1f}"),
    ("written, rows/s", "write", "{:,.0f}"),
    ("until on the disk", "write_on_disk", "{:,.0f}"),
    ("read warm, rows/s", "read_warm.ready{clock}", "{:,.0f}"),
    ("in a worker", "read_warm.joined{clock}", "{:,.0f}"),
    ("kdcli to this", "kdcli_over_this.ready{clock}", "{:.2f}"),
    ("in a worker", "kdcli_over_this.joined{clock}", "{:.2f}"),
    ("read cold, rows/s", "read_cold", "{:,.0f}"),
    ("step, ms", "step_ms", "{:,.0f}"),
    ("step to plain", "step_over_plain", "{:.2f}"),
    ("its processor time", "step_cpu_over_plain", "{:.2f}"),
    ("peak memory, MB", "peak_mb", "{:,.0f}"),
)
# method, kind, at least so many times as fast
READ_TARGETS = (("ld", "zarr", 8.0), ("ld", "npy", 5.0), ("ld", "pt", 5.0), ("pfi", "npy", 1.0), ("pfi", "pt", 1.0))


def targets(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The targets of warm random reads, with what was measured: tensors ready for the loss, and joined in a data worker.

    ``with_regions``: ready, and where the sparse tensors are is computed too, which a loader of dense files has to do.
    """
    found = []
    for method, kind, least in READ_TARGETS:
        columns = result["methods"][method]
        ready = f"ready{result['clock']}"
        ratio = columns[kind]["kdcli_over_this"]
        regions = columns["rows"]["regions_ms"] / 1000 if kind in FORMATS else 0.0
        found.append(
            {
                "what": f"{method}: kdcli against {TITLES[kind]}",
                "target": least,
                "measured": ratio[ready],
                "in_a_worker": ratio[f"joined{result['clock']}"],
                "with_regions": ratio[ready] + columns["kdcli"]["read_warm"][ready] * regions,
                "met": ratio[ready] >= least,
            }
        )
    return found


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a table for each method, and the targets. A row of a store is one image in one view."""
    lines = []
    for method, found in result["methods"].items():
        lines += [f"`{method}`", "", "| | " + " | ".join(c[0] for c in COLUMNS) + " |"]
        lines.append("| --- |" + " --- |" * len(COLUMNS))
        for kind, title in TITLES.items():
            values = found.get(kind, {})
            if values.get("lacking"):
                lines.append(f"| {title} | {values['lacking']} |" + " |" * (len(COLUMNS) - 1))
                continue
            cells = [_cell(values, name.format(clock=result["clock"]), form) for _, name, form in COLUMNS]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["| warm reads | at least | ready for the loss | in a worker | with regions computed | |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for t in result["targets"]:
        ratios = f"{t['measured']:.2f} | {t['in_a_worker']:.2f} | {t['with_regions']:.2f}"
        lines.append(f"| {t['what']} | {t['target']:g} | {ratios} | {'met' if t['met'] else 'missed'} |")
    return "\n".join(lines) + "\n"


def _cell(values: Mapping[str, Any], name: str, form: str) -> str:
    found: Any = values
    for part in name.split("."):
        if part not in found:
            return "-"
        found = found[part]
    return form.format(found)
