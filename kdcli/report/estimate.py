"""What an estimate says, in words."""

from __future__ import annotations

from kdcli.engine.caching.estimate.estimate import BreakEven, Estimate
from kdcli.report.text import duration, size

SLOWEST = {  # of engine.estimate.stage_seconds
    "teacher": "as fast as the teacher",
    "loading": "images load slower than the teacher takes them",
    "encoding": "encoding is slower than the teacher",
    "disk": "the disk is slower than the teacher",
    "cores": "the cores are busy",
}


def priced(found: Estimate) -> str:
    """Rows, bytes, time and what limits it, in a line."""
    return (
        f"estimate: {found.rows} rows, {size(found.bytes_total)} on disk ({size(found.bytes_raw)} before compression), "
        f"{duration(found.seconds)} at {found.rows_per_s:.1f} rows/s ({SLOWEST[found.slowest]})"
        + ("" if found.disk_timed else "; writing there was not timed")
        + ("" if found.free_bytes is None else f"; {size(found.free_bytes)} are free")
    )


def paid_back(found: BreakEven) -> str:
    """When a store is paid back, in a line."""
    three = 3 * found.epochs_each * found.live_epoch_seconds
    return (
        f"break-even: as long as a live teacher's forward passes in {found.epochs:.1f} epochs, or in {found.students:.2g} "
        f"students of {found.epochs_each} epochs; three such students: {duration(three)} of a live teacher, "
        f"{duration(found.store_seconds)} of writing the store"
    )
