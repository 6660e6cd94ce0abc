"""The gate before a store is written: what the teacher scores on val."""

from __future__ import annotations

from pathlib import Path

from kdcli.data.coco import has_split, open_split
from kdcli.data.reading import Reading
from kdcli.detectors.base import MM_FEATURES
from kdcli.engine.caching.plan import StorePlan
from kdcli.engine.evaluation.evaluate import evaluate
from kdcli.engine.loading.loader import Loader
from kdcli.engine.loading.samples import SampleSource
from kdcli.engine.loading.selection import usable
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.errors import GateError


def measure_teacher(plan: StorePlan, reporter: ProgressReporter) -> float | None:
    """The teacher's AP on the val split, which the manifest keeps; None without one, and of a teacher without a head.

    Raises GateError when it is below ``min_teacher_ap``.
    """
    root, forward, least = Path(plan.options.data), plan.teacher.forward, plan.options.min_teacher_ap
    if not scores(plan):
        reporter.message(f"{forward.detector.spec.name} gives features only: the teacher's AP is left out")
        return None
    if not has_split(root, "val"):
        require_able(None, least)
        reporter.message("no val split: the teacher's AP is not measured")
        return None
    reading = Reading(plan.options.exif, plan.options.clip_boxes, not plan.source.dataset.exif)
    used = usable(open_split(root, "val"), plan.options.skip_bad, reporter, reading=reading, trains=False)
    val = used.dataset
    reporter.stage("teacher AP", len(used.positions))
    source = SampleSource.for_evaluation(val, plan.source.canvas, forward.detector)
    found = evaluate(
        forward.detector, val, plan.source.canvas, device=plan.teacher.device, batch=forward.micro_batch,
        loader=Loader(source, plan.teacher.workers), forward=forward.outputs, relabel=forward.relabel,
        left_out=used.left_out, advance=reporter.advance,
    )  # fmt: skip
    ap = found.metrics.ap
    reporter.message(f"teacher AP on val: {'not defined' if ap is None else f'{ap:.1f}'}")
    require_able(ap, least)
    return ap


def scores(plan: StorePlan) -> bool:
    """Whether the teacher has a head, so that it has an AP."""
    return plan.teacher.forward.detector.spec.detector != MM_FEATURES


def require_able(ap: float | None, least: float) -> None:
    """Raises GateError when the AP is below ``--min-teacher-ap``, or was not measured: a teacher that knows nothing teaches
    nothing.
    """
    if ap is None and least > 0:
        raise GateError(
            f"--min-teacher-ap {least:g} cannot be answered: the data set has no val split with ground truth to measure the "
            "teacher on; nothing was written. Add one, or leave the gate out"
        )
    if ap is not None and not ap >= least:
        raise GateError(
            f"the teacher has {ap:.1f} AP on val, below --min-teacher-ap {least:g}; nothing was written. Check its "
            "canvas and classes, or lower the gate"
        )
