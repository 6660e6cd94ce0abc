"""Runs a detector over a split and scores it with pycocotools."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcli.classes import ClassList
from kdcli.data import coco
from kdcli.data.views import to_image
from kdcli.detectors.base import Detector, count_parameters
from kdcli.engine.evaluation.coco_metrics import Metrics, coco_results, evaluate_detections
from kdcli.engine.loading.loader import Loader
from kdcli.engine.loading.orientation import batches_by_orientation
from kdcli.engine.loading.samples import Item, Sample, SampleSource
from kdcli.engine.runtime.distributed import gathered, world_rank
from kdcli.errors import DataError
from kdcli.structures import Canvas
from kdcli.tensors import BACKBONE, Tensors, world_size

IDENTITY = "identity"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    metrics: Metrics
    results: list[dict[str, Any]]  # COCO result format
    images_per_s: float  # model and decoding, without waiting for images
    parameters: int


def evaluation_batches(source: SampleSource, positions: list[int], batch: int) -> list[list[Item]]:
    """Images in the order of the data set, batched by orientation."""
    return batches_by_orientation(source, [(position, IDENTITY) for position in positions], batch)


def require_same_classes(detector_classes: ClassList, dataset: coco.Dataset) -> None:
    """Raises DataError when a checkpoint's classes are not those of the data set, id by id and name by name."""
    if detector_classes != dataset.classes:
        raise DataError(
            f"the checkpoint knows {_names(detector_classes)}, the data set {dataset.annotations_path} has "
            f"{_names(dataset.classes)}; evaluate on the data set that it was trained for"
        )


Forward = Callable[[Tensor], Tensors]  # uint8 canvases [B, 3, H, W] -> float32 outputs


def plain_forward(detector: Detector, amp: torch.dtype | None) -> Forward:
    """The detector itself under autocast."""

    def forward(images: Tensor) -> Tensors:
        with torch.autocast(images.device.type, amp, enabled=amp is not None):
            outputs = detector(images.float().div_(255))
        return {name: value.float() for name, value in outputs.items() if name not in BACKBONE}

    return forward


def detect(
    detector: Detector, forward: Forward, loader: Loader, batches: list[list[Item]], device: torch.device
) -> Iterator[tuple[Sample, np.ndarray, np.ndarray, np.ndarray, float]]:
    """For each image: sample, boxes [D, 4] xyxy image pixels, scores, labels, and its share of the computing seconds."""
    detector.eval()
    for samples in loader.samples(batches):
        started = time.perf_counter()
        images = torch.stack([s.image for s in samples]).to(device, non_blocking=True)
        content = torch.tensor([s.geometry.content for s in samples], device=device)
        with torch.no_grad():
            outputs = forward(images)
        found = detector.decode(outputs, content, samples[0].geometry.canvas)
        moved = [(d.boxes.cpu(), d.scores.cpu().numpy(), d.labels.cpu().numpy()) for d in found]
        seconds = (time.perf_counter() - started) / len(samples)
        for sample, (boxes, scores, labels) in zip(samples, moved, strict=True):
            yield sample, to_image(boxes, sample.geometry).numpy(), scores, labels, seconds


def evaluate(
    detector: Detector,
    dataset: coco.Dataset,
    canvas: Canvas,
    *,
    device: torch.device,
    batch: int,
    loader: Loader,
    forward: Forward | None = None,
    relabel: np.ndarray | None = None,
    left_out: frozenset[int] = frozenset(),
    advance: Any = None,
) -> Evaluation:
    """Score ``detector`` on ``dataset`` without the images at ``left_out``. ``advance(n)`` is called as images finish.

    ``forward`` stands in for the detector's own float32 forward: another precision, or classes in another order.
    ``relabel``: for each of the detector's own labels that of ``dataset``, -1 for a class that it does not have.
    """
    category_ids = np.array(dataset.classes.ids)
    positions = [i for i in range(dataset.num_images) if i not in left_out]
    results: list[dict[str, Any]] = []
    seconds = 0.0
    batches = evaluation_batches(loader.source, positions[world_rank() :: world_size()], batch)
    forward = forward or plain_forward(detector, None)
    for sample, boxes, scores, labels, cost in detect(detector, forward, loader, batches, device):
        if relabel is not None:
            labels = relabel[labels]
            boxes, scores, labels = boxes[labels >= 0], scores[labels >= 0], labels[labels >= 0]
        results += coco_results(sample.key.image_id, boxes, scores, category_ids[labels])
        seconds += cost
        if advance is not None:
            advance(world_size())
    results = gathered(results)
    truth = coco.coco_dict(dataset)
    if left_out:
        gone = {dataset.image_id(i) for i in left_out}
        truth["images"] = [i for i in truth["images"] if i["id"] not in gone]
        truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] not in gone]
    metrics = evaluate_detections(truth, results)
    return Evaluation(metrics, results, len(positions) / max(seconds, 1e-9), count_parameters(detector))


def _names(classes: ClassList) -> str:
    return ", ".join(f"{c.id}:{c.name}" for c in classes[:12]) + (" ..." if len(classes) > 12 else "")
