"""Samples and batches: everything that is read and computed for an image in a view, in a data worker.

What a sample is depends on (seed, epoch, image id) alone, never on a worker's state, so that a resumed run, a run with
other workers and a run on several processes see the same pixels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from kdcli.data import coco
from kdcli.data.images import read_image
from kdcli.data.views import Geometry, render, to_canvas, view_geometry
from kdcli.detectors.base import Detector
from kdcli.engine.loading.seen import short_digests
from kdcli.errors import KDError, StoreError
from kdcli.geometry.assign import AssignerSpec, assign, follows_from_positives, from_positives
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec, compute_entries, guard
from kdcli.store.batch_buffers import BatchSlot, allocate_batch, collate_rows
from kdcli.store.reader import Row, StoreReader
from kdcli.structures import Batch, Canvas, Entries, RowKey, Targets
from kdcli.tensors import Region

T = TypeVar("T")
Item = tuple[int, str]  # (position of the image in its data set, view)
PIXEL_TOLERANCE = 2  # of 255: libjpeg and resizing may round otherwise on a processor with other vector instructions


@dataclass(frozen=True, kw_only=True)
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
    slot: BatchSlot | None = None  # that large ones of them are in


@dataclass(frozen=True)
class LoadedImage:
    """What was read for one item."""

    geometry: Geometry
    image: Tensor  # [3, H, W] uint8, the canvas
    content_hash: bytes
    row: Row | None


@dataclass(frozen=True)
class ItemTargets:
    """What the annotations say of one item, on its canvas."""

    geometry: Geometry
    boxes: Tensor  # [G, 4] float32, xyxy canvas pixels
    labels: Tensor  # [G]
    assigned: Tensor  # [N] int32; empty when neither a loss nor a region reads it
    entries: Entries | None  # None without regions


@dataclass(frozen=True, kw_only=True)
class SampleSource:
    """Makes samples. With ``reader``, their teacher arrays and entries come from its store, else entries are computed.

    Made by ``for_training``, ``for_evaluation`` or ``for_caching``. Pixels come from the store too when it has them; no
    image file is opened then. The stored index is the truth for distillation: a row whose image, boxes, labels, view or
    region definition differ from ours is refused.
    """

    dataset: coco.Dataset
    canvas: Canvas
    view_seed: int
    grid: Grid
    assigner: AssignerSpec
    region_spec: RegionSpec
    regions: frozenset[str] = frozenset()  # that entries are computed for; none in plain training and evaluation
    detection_loss: bool = True  # reads the assignment of every image; without it only regions do: 1.3 ms an image
    reader: StoreReader | None = None
    row_definition: str | None = None  # of the reader's rows
    stored_positives: bool = False  # the rows have them, by this assigner, and all it gave follows from them

    @classmethod
    def for_training(
        cls, dataset: coco.Dataset, canvas: Canvas, detector: Detector, *, view_seed: int = 0
    ) -> SampleSource:
        """Samples that ``detector`` trains on. A teacher adds to them: see ``with_regions`` and ``with_store``."""
        return cls(
            dataset=dataset, canvas=canvas, view_seed=view_seed, grid=detector.grid, assigner=detector.assigner,
            region_spec=detector.region_defaults,
        )  # fmt: skip

    @classmethod
    def for_evaluation(cls, dataset: coco.Dataset, canvas: Canvas, detector: Detector) -> SampleSource:
        """Samples that ``detector`` is scored on: nothing is assigned."""
        return replace(cls.for_training(dataset, canvas, detector), detection_loss=False)

    @classmethod
    def for_caching(
        cls, dataset: coco.Dataset, canvas: Canvas, detector: Detector, *, view_seed: int, region_spec: RegionSpec,
        regions: frozenset[str],
    ) -> SampleSource:  # fmt: skip
        """Samples that a teacher's rows are made of: with the entries of ``regions``, and no assignment without them."""
        source = cls.for_training(dataset, canvas, detector, view_seed=view_seed)
        return replace(source, region_spec=region_spec, regions=regions, detection_loss=False)

    def with_regions(self, region_spec: RegionSpec, regions: frozenset[str]) -> SampleSource:
        """The same samples with the entries of ``regions``, as ``region_spec`` defines them."""
        return replace(self, region_spec=region_spec, regions=regions)

    def with_store(self, reader: StoreReader, definition: str, *, index_aligned: bool) -> SampleSource:
        """The same samples with the rows of ``reader``, whose guards were made with ``definition``.

        ``index_aligned``: the rows' anchors and assigner are those of this source.
        """
        known = index_aligned and Region.MAIN in self.regions and follows_from_positives(self.assigner)
        return replace(self, reader=reader, row_definition=definition, stored_positives=known)

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
        return self.complete(item, self.fetch([item])[0])

    def load_batch(self, items: Sequence[Item], mapping: Callable[..., Iterable[Any]] = map) -> list[Sample | KDError]:
        """The samples of a batch; neighbours that are views of one image are read together, images by ``mapping``.

        Errors are values, in the place of what they are of: a process or a thread that raised one would lose its one line.
        """
        layout = () if self.reader is None else self.reader.layout.values()
        placed = zip(items, allocate_batch(layout, len(items), shared=get_worker_info() is not None), strict=True)
        images = [list(views) for _, views in itertools.groupby(placed, key=lambda item: item[0][0])]
        fetched = list(mapping(functools.partial(_attempt, self._fetch), images))
        made: list[Sample | KDError] = []
        for views, found in zip(images, fetched, strict=True):
            if isinstance(found, KDError):
                made.append(found)
            else:
                made += [_attempt(self.complete, item, one) for (item, _), one in zip(views, found, strict=True)]
        return made

    def fetch(self, items: Sequence[Item], slots: Sequence[BatchSlot | None] = ()) -> list[LoadedImage]:
        """What ``load`` reads for views of one image, which is decoded once: large, and outside of Python's lock.

        ``slots``: where their rows go. Raises the same errors.
        """
        found, decoded = [], None
        for item, slot in zip(items, slots or [None] * len(items), strict=True):
            position, view = item
            geometry = self.geometry(item)
            row = None if self.reader is None else self.reader.read(RowKey(self.dataset.image_id(position), view), slot)
            if row is not None and row.image is not None:
                found.append(LoadedImage(geometry, torch.from_numpy(row.image), row.content, row))
                continue
            if decoded is None:
                size = geometry.height, geometry.width
                decoded = read_image(self.dataset.image_path(position), size, self.dataset.exif)
            pixels, content_hash = decoded
            found.append(LoadedImage(geometry, render(pixels, geometry), content_hash, row))
        return found

    def _fetch(self, placed: Sequence[tuple[Item, BatchSlot]]) -> list[LoadedImage]:
        return self.fetch([item for item, _ in placed], [slot for _, slot in placed])

    def complete(self, item: Item, fetched: LoadedImage) -> Sample:
        """What ``load`` computes: many small steps, which two threads would do more slowly than one. Raises StoreError."""
        position, view = item
        geometry, row = fetched.geometry, fetched.row
        key = RowKey(self.dataset.image_id(position), view)
        canvas = geometry.canvas
        boxes, labels = canvas_boxes(self.dataset, position, geometry)
        sample = Sample(
            key=key,
            image=fetched.image,
            geometry=geometry,
            boxes=boxes,
            labels=labels,
            assigned=torch.empty(0, dtype=torch.int32),
            valid=self.grid.valid(canvas, geometry.content),
            content_hash=fetched.content_hash,
        )
        if row is None:
            assigned, entries = self._targets(key, geometry, boxes)
            return replace(sample, assigned=assigned, entries=entries)
        self.check_row(row, sample)
        if row.entries is not None and self.stored_positives:
            main = row.entries.select(Region.MAIN)
            assigned = from_positives(
                self.assigner, self.grid, canvas, geometry.content, row.entries.index[main], row.entries.gt[main]
            )
        else:
            assigned = assign(self.assigner, self.grid, canvas, boxes, geometry.content)
        return replace(sample, assigned=assigned, entries=row.entries, arrays=row.arrays, slot=row.slot)

    def targets(self, item: Item) -> ItemTargets:
        """What is computed of ``item`` from its annotations, whatever a store says; reads no image."""
        position, view = item
        geometry = self.geometry(item)
        boxes, labels = canvas_boxes(self.dataset, position, geometry)
        assigned, entries = self._targets(RowKey(self.dataset.image_id(position), view), geometry, boxes)
        return ItemTargets(geometry, boxes, labels, assigned, entries)

    def _targets(self, key: RowKey, geometry: Geometry, boxes: Tensor) -> tuple[Tensor, Entries | None]:
        """The assignment, if anything reads it, and the entries of the regions, if there are any."""
        canvas, content = geometry.canvas, geometry.content
        if not (self.detection_loss or self.regions):
            return torch.empty(0, dtype=torch.int32), None
        assigned = assign(self.assigner, self.grid, canvas, boxes, content)
        if not self.regions:
            return assigned, None
        entries = compute_entries(
            self.regions, self.region_spec, self.grid, canvas, boxes, assigned, content, str(key)
        )  # fmt: skip
        return assigned, entries

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
            if int(box.max()) >= len(sample.boxes) or bool((box[row.entries.select(Region.MAIN)] < 0).any()):
                raise StoreError(f"{sample.key}: its entries name boxes that are not there; {again}")
        if row.image is not None and not np.shares_memory(row.image, sample.image.numpy()):
            difference = np.abs(row.image.astype(np.int16) - sample.image.numpy()).max()
            if difference > PIXEL_TOLERANCE:
                raise StoreError(f"{sample.key}: its stored pixels are not those of its image file; {again}")


def canvas_boxes(dataset: coco.Dataset, position: int, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Boxes [G, 4] float32 (xyxy canvas pixels) and labels [G] of an image that are left where ``geometry`` puts it."""
    boxes_np, labels_np = dataset.training_boxes(position)
    boxes, keep = to_canvas(torch.from_numpy(boxes_np), geometry)
    return boxes[keep], torch.from_numpy(labels_np)[keep]


def _attempt(function: Callable[..., T], *arguments: Any) -> T | KDError:
    try:
        return function(*arguments)
    except KDError as error:
        return error


@functools.lru_cache(maxsize=4)
def region_definition(canvas: Canvas, grid: Grid, assigner: AssignerSpec, regions: RegionSpec) -> str:
    """What the entries of a row depend on beside its boxes, as one text."""
    return repr((str(canvas), grid.to_json(), assigner.to_json(), regions.to_json()))


def collate(samples: Sequence[Sample], reader: StoreReader | None) -> Batch:
    """Join samples of one orientation into a batch."""
    entries = None
    if samples[0].entries is not None:
        entries = Entries.collate([s.entries for s in samples if s.entries is not None])
    rows = {} if reader is None else collate_rows(samples, reader.layout.values())
    targets = Targets(
        boxes=[s.boxes for s in samples],
        labels=[s.labels for s in samples],
        content=torch.tensor([s.geometry.content for s in samples]),
        canvas=samples[0].geometry.canvas,
        assigned=torch.stack([s.assigned for s in samples]),
        valid=torch.stack([s.valid for s in samples]),
    )
    return Batch(
        torch.stack([s.image for s in samples]), targets, [s.key for s in samples], entries, rows,
        short_digests([s.content_hash for s in samples]),
    )  # fmt: skip
