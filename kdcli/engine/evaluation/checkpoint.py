"""Scores a checkpoint on a split: from two paths to AP."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcli.data.coco import open_split
from kdcli.data.reading import Reading
from kdcli.detectors.features import require_head
from kdcli.detectors.weights import load_detector
from kdcli.engine.evaluation.coco_metrics import Metrics, write_detections
from kdcli.engine.evaluation.evaluate import evaluate, plain_forward, require_same_classes
from kdcli.engine.loading.loader import Loader
from kdcli.engine.loading.samples import SampleSource
from kdcli.engine.loading.selection import usable
from kdcli.engine.runtime.device import pick_amp, pick_device
from kdcli.engine.runtime.progress import NullReporter, ProgressReporter
from kdcli.engine.runtime.threads import pick_workers
from kdcli.files import atomic_write_text
from kdcli.options import Exif, convert
from kdcli.structures import Canvas

SILENT = NullReporter()


@dataclass(frozen=True, kw_only=True)
class CheckpointScores:
    """What ``evaluate_checkpoint`` found, and what it scored."""

    metrics: Metrics
    results: list[dict[str, Any]]  # the detections, in COCO's result format
    images_per_s: float  # model and decoding, without waiting for images
    parameters: int
    images: int  # scored
    canvas: str
    checkpoint: Path
    weights_sha256: str

    def to_json(self) -> dict[str, Any]:
        """All but the detections, the metrics flat: ``ap``, ``ap50``, ..., ``per_class``, then the rest."""
        others = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del others["metrics"], others["results"]
        return {**dataclasses.asdict(self.metrics), **others, "checkpoint": str(self.checkpoint)}


def evaluate_checkpoint(
    checkpoint: Path | str, data: Path | str, *, split: str = "val", canvas: str | None = None, batch: int = 8,
    device: str = "auto", amp: str = "auto", workers: int | None = None, skip_bad: bool = False,
    clip_boxes: bool = False, exif: str = "auto", reporter: ProgressReporter = SILENT,
) -> CheckpointScores:  # fmt: skip
    """Score a run folder's last weights, or a checkpoint file, on ``split`` of the data set folder ``data``.

    ``canvas``: as ``Canvas.parse`` reads it; None: the checkpoint's own. ``batch``: images a forward pass. ``workers``:
    data workers; None: one for each spare core, at most eight. ``skip_bad``: leave faulty images out instead of refusing
    them. ``clip_boxes``: clip boxes beyond the border instead. ``exif``: whether EXIF orientations are applied, ``auto``,
    ``apply`` or ``ignore``. Raises MissingPathError, OptionError for a foreign checkpoint or option, DataError for a fault
    in the data or for classes that are not the checkpoint's.
    """
    reading = Reading(convert("exif", exif, Exif), clip_boxes)
    detector, meta = load_detector(checkpoint)
    require_head(detector, f"checkpoint '{meta.path}'")
    dataset = open_split(Path(data), split)
    require_same_classes(meta.classes, dataset)
    target, chosen = Canvas.parse(canvas or meta.canvas), pick_device(device)
    used = usable(dataset, skip_bad, reporter, reading=reading, trains=False)
    dataset = used.dataset
    reporter.stage(f"eval {split}", len(used.positions))
    found = evaluate(
        detector.to(chosen), dataset, target, device=chosen, batch=batch,
        loader=Loader(SampleSource.for_evaluation(dataset, target, detector), pick_workers(workers)),
        forward=plain_forward(detector, pick_amp(amp, chosen)),
        left_out=used.left_out, advance=reporter.advance,
    )  # fmt: skip
    return CheckpointScores(
        metrics=found.metrics, results=found.results, images_per_s=found.images_per_s, parameters=found.parameters,
        images=len(used.positions), canvas=str(target), checkpoint=meta.path, weights_sha256=meta.weights_sha256,
    )  # fmt: skip


def write_scores(out: Path, scores: CheckpointScores) -> None:
    """``detections.json`` (COCO results) and ``metrics.json`` in the folder ``out``, which is made."""
    out.mkdir(parents=True, exist_ok=True)
    write_detections(out / "detections.json", scores.results)
    atomic_write_text(out / "metrics.json", json.dumps(scores.to_json(), indent=1) + "\n")
