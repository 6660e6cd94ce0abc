"""Samples and batches: which image in which view comes when, and everything that is computed for it in a data worker.

What a sample is depends on (seed, epoch, image id) alone, never on a worker's state, so that a resumed run, a run with
other workers and a run on several processes see the same pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdcli.cache.reader import CacheReader, Row
from kdcli.cache.schema import collate as collate_rows
from kdcli.data import coco
from kdcli.data.images import read_image
from kdcli.data.views import Geometry, orient, render, to_canvas, view_geometry
from kdcli.errors import KDError, StoreError
from kdcli.geometry.assign import AssignerSpec, assign
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec, compute_entries, guard
from kdcli.structures import Batch, Canvas, Entries, RowKey, Targets

Item = tuple[int, str]  # (position of the image in its data set, view)
PIXEL_TOLERANCE = 2  # of 255: libjpeg and resizing may round otherwise on a processor with other vector instructions


@dataclass(frozen=True)
class Sample:
    """One image in one view, with its targets, entries and stored teacher arrays."""

    key: RowKey
    image: Tensor  # [3, H, W] uint8
    geometry: Geometry
    boxes: Tensor  # [G, 4] float32
    labels: Tensor  # [G]
    assigned: Tensor  # [N] int32
    valid: Tensor  # [P] bool
    content_hash: bytes
    entries: Entries | None = None
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleSource:
    """Makes samples. With ``reader``, their teacher arrays and entries come from its store, else entries are computed.

    Pixels come from the store too when it has them; no image file is opened then. ``regions`` is empty in plain training.
    The stored index is the truth for distillation: a row whose image, boxes, labels, view or region definition differ from
    ours is refused.
    """

    dataset: coco.Dataset
    canvas: Canvas
    view_seed: int
    grid: Grid
    assigner: AssignerSpec
    region_spec: RegionSpec
    regions: frozenset[str] = frozenset()
    reader: CacheReader | None = None
    targets: bool = True  # False: evaluation, which reads no assignment
    row_definition: str | None = None  # of the reader's rows

    @property
    def definition(self) -> str:
        """What the entries of a row depend on beside its boxes; part of the row's guard."""
        if self.row_definition is not None:
            return self.row_definition
        return region_definition(self.canvas, self.grid, self.assigner, self.region_spec)

    def geometry(self, item: Item) -> Geometry:
        """Where the pixels of ``item`` go."""
        position, view = item
        height, width = self.dataset.image_size(position)
        image_id = self.dataset.image_id(position)
        return view_geometry(self.canvas, height, width, view, self.view_seed, image_id)

    def load(self, item: Item) -> Sample:
        """Read the pixels, place, assign and, for distillation, find the entries of one item.

        Raises DataError for a bad image and StoreError for a row that is missing, corrupt or foreign.
        """
        position, view = item
        geometry = self.geometry(item)
        key = RowKey(self.dataset.image_id(position), view)
        row = None if self.reader is None else self.reader.read(key)
        if row is not None and row.image is not None:
            image, content_hash = torch.from_numpy(row.image), row.content
        else:
            pixels, content_hash = read_image(self.dataset.image_path(position), (geometry.height, geometry.width))
            image = render(pixels, geometry)
        boxes_np, labels_np = self.dataset.training_boxes(position)
        boxes, keep = to_canvas(torch.from_numpy(boxes_np), geometry)
        boxes, labels = boxes[keep], torch.from_numpy(labels_np)[keep]
        canvas = geometry.canvas
        assigned = torch.empty(0, dtype=torch.int32)
        if self.targets:
            assigned = assign(self.assigner, self.grid, canvas, boxes, geometry.content)
        sample = Sample(
            key=key,
            image=image,
            geometry=geometry,
            boxes=boxes,
            labels=labels,
            assigned=assigned,
            valid=self.grid.valid(canvas, geometry.content),
            content_hash=content_hash,
        )
        if row is not None:
            self.check_row(row, sample)
            return replace(sample, entries=row.entries, arrays=row.arrays)
        if self.regions:
            entries = compute_entries(
                self.regions, self.region_spec, self.grid, canvas, boxes, assigned, geometry.content, str(key)
            )
            return replace(sample, entries=entries)
        return sample

    def check_row(self, row: Row, sample: Sample) -> None:
        """Raises StoreError when a stored row does not belong to the image, view, boxes and regions of ``sample``."""
        again = "write the store again"
        if row.content != sample.content_hash:
            raise StoreError(f"{sample.key}: the image file is not the one that the teacher saw; {again}")
        if not np.array_equal(row.geometry, sample.geometry.to_array()):
            raise StoreError(f"{sample.key}: its view is not the one that the teacher saw; {again}")
        if row.guard != guard(sample.boxes, sample.labels, self.definition):
            raise StoreError(f"{sample.key}: its boxes, labels or regions are not those of the store; {again}")
        if row.entries is not None and len(row.entries.gt):
            box = row.entries.gt
            if int(box.max()) >= len(sample.boxes) or bool((box[row.entries.select("main")] < 0).any()):
                raise StoreError(f"{sample.key}: its entries name boxes that are not there; {again}")
        if row.image is not None and not np.shares_memory(row.image, sample.image.numpy()):
            difference = np.abs(row.image.astype(np.int16) - sample.image.numpy()).max()
            if difference > PIXEL_TOLERANCE:
                raise StoreError(f"{sample.key}: its stored pixels are not those of its image file; {again}")


def region_definition(canvas: Canvas, grid: Grid, assigner: AssignerSpec, regions: RegionSpec) -> str:
    """What the entries of a row depend on beside its boxes, as one text."""
    return repr((str(canvas), grid.to_json(), assigner.to_json(), regions.to_json()))


def collate(samples: list[Sample], reader: CacheReader | None) -> Batch:
    """Join samples of one orientation into a batch."""
    entries = None
    if samples[0].entries is not None:
        entries = Entries.collate([s.entries for s in samples if s.entries is not None])
    rows = {} if reader is None else collate_rows([s.arrays for s in samples], reader.layout.values())
    targets = Targets(
        boxes=[s.boxes for s in samples],
        labels=[s.labels for s in samples],
        content=torch.tensor([s.geometry.content for s in samples]),
        canvas=samples[0].geometry.canvas,
        assigned=torch.stack([s.assigned for s in samples]),
        valid=torch.stack([s.valid for s in samples]),
    )
    return Batch(torch.stack([s.image for s in samples]), targets, [s.key for s in samples], entries, rows)


class Loader:
    """Batches (or lists of samples) in a planned order, made ahead by ``workers`` processes (0: in this one)."""

    def __init__(self, source: SampleSource, workers: int) -> None:
        self.source = source
        self._plan = _Plan()
        self._workers = workers
        self._loaders: dict[Callable[..., Any], DataLoader[Any]] = {}

    def samples(self, batches: list[list[Item]]) -> Iterator[list[Sample]]:
        """The samples of each planned batch. Raises the first error that a worker met."""
        for packed in self._run(batches, _pack):
            yield [_unpack(p) for p in packed]

    def batches(self, batches: list[list[Item]]) -> Iterator[Batch]:
        """Collated batches in the planned order. Raises the first error that a worker met."""
        for wire in self._run(batches, functools.partial(_to_wire, self.source.reader)):
            yield _from_wire(wire)

    def _run(self, batches: list[list[Item]], collate_fn: Callable[..., Any]) -> Iterator[Any]:
        self._plan.batches = batches
        kind = collate_fn.func if isinstance(collate_fn, functools.partial) else collate_fn
        if kind not in self._loaders:
            self._loaders[kind] = DataLoader(
                _Loadable(self.source),
                batch_sampler=self._plan,  # items are (position, view), not numbers
                num_workers=self._workers,
                collate_fn=collate_fn,
                persistent_workers=self._workers > 0,
                prefetch_factor=4 if self._workers else None,
                # of its own: DataLoader draws a seed at each pass, which must not move the run's random state
                generator=torch.Generator().manual_seed(0),
            )
        for made in self._loaders[kind]:
            if isinstance(made, KDError):
                raise made
            yield made


class _Loadable(Dataset[Any]):
    """What DataLoader wants. An error travels as a value: re-raised by DataLoader it would lose its one line."""

    def __init__(self, source: SampleSource) -> None:
        self.source = source

    def __getitem__(self, item: Item) -> Sample | KDError:
        try:
            return self.source.load(item)
        except KDError as error:
            return error


class _Plan:
    """A batch sampler whose list of batches is set before each pass, so that workers live through all epochs."""

    def __init__(self) -> None:
        self.batches: list[list[Item]] = []

    def __iter__(self) -> Iterator[list[Item]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _to_wire(reader: CacheReader | None, samples: list[Sample | KDError]) -> Any:
    """A batch with its boxes end to end: each tensor that leaves a worker costs a file descriptor."""
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, KDError):
            return sample
        good.append(sample)
    batch = collate(good, reader)
    counts = [len(b) for b in batch.targets.boxes]
    boxes, labels = torch.cat(batch.targets.boxes), torch.cat(batch.targets.labels)
    return replace(batch, targets=replace(batch.targets, boxes=[boxes], labels=[labels])), counts


def _from_wire(wire: tuple[Batch, list[int]]) -> Batch:
    batch, counts = wire
    boxes = list(torch.split(batch.targets.boxes[0], counts))
    labels = list(torch.split(batch.targets.labels[0], counts))
    return replace(batch, targets=replace(batch.targets, boxes=boxes, labels=labels))


def _pack(samples: list[Sample | KDError]) -> Any:
    """Samples with arrays in place of tensors, for the same reason; entries keep theirs."""
    for sample in samples:
        if isinstance(sample, KDError):
            return sample
    return [replace(s, **{n: getattr(s, n).numpy() for n in _TENSORS}) for s in samples if isinstance(s, Sample)]


def _unpack(sample: Sample) -> Sample:
    tensors: dict[str, Any] = {n: torch.from_numpy(getattr(sample, n)) for n in _TENSORS}
    return replace(sample, **tensors)


_TENSORS = ("image", "boxes", "labels", "assigned", "valid")


def orientation(source: SampleSource, item: Item) -> Canvas:
    """The orientation of the canvas that ``item`` takes."""
    if item[1].startswith("crop-"):
        return source.geometry(item).canvas
    return orient(source.canvas, *source.dataset.image_size(item[0]))
