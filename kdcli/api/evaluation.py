"""Scoring a checkpoint: what ``kdcli eval`` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdcli.api.reporter import Progress, reporter_of
from kdcli.engine.evaluation.checkpoint import evaluate_checkpoint


def evaluate(
    checkpoint: Path | str, *, data: Path | str, split: str = "val", canvas: str | None = None, batch: int = 8,
    device: str = "auto", amp: str = "auto", workers: int | None = None, skip_bad: bool = False,
    clip_boxes: bool = False, exif: str = "auto", progress: Progress = None,
) -> dict[str, Any]:  # fmt: skip
    """Score a run folder's last weights, or a checkpoint, with pycocotools: the metrics of ``kdcli eval --json``.

    ``ap``, ``ap50``, ..., ``per_class`` on the scale 0 to 100, ``images_per_s``, ``parameters``. ``batch``: images a
    forward pass. ``clip_boxes``, ``exif``: as the command's flags. ``progress``: True for a bar on stderr, or a reporter.
    Raises MissingPathError, OptionError for a foreign checkpoint or option, DataError for a fault in the data or other
    classes.
    """
    with reporter_of(progress) as reporter:
        return evaluate_checkpoint(
            checkpoint, data, split=split, canvas=canvas, batch=batch, device=device, amp=amp, workers=workers,
            skip_bad=skip_bad, clip_boxes=clip_boxes, exif=exif, reporter=reporter,
        ).to_json()  # fmt: skip
