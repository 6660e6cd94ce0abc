"""A store in somebody else's training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from kdcli.api.arguments import (
    Boxes,
    Key,
    batch_size,
    method_list,
    method_options,
    row_key,
    row_keys,
    row_targets,
    store_path,
)
from kdcli.api.batch import StoredRows, TeacherBatch
from kdcli.api.view import StoreView
from kdcli.data.coco import Dataset, open_split
from kdcli.data.views import Geometry, to_canvas
from kdcli.detectors.build import default_keys
from kdcli.engine.loading.epoch_order import drawn_views, image_draws, ordered_batches
from kdcli.engine.loading.selection import as_stored
from kdcli.engine.runtime.device import pick_device
from kdcli.engine.teacher.binding import stored_definition, stored_teacher
from kdcli.engine.teacher.match import require_match
from kdcli.engine.teacher.specs import TeacherSide
from kdcli.errors import OptionError, StoreError
from kdcli.geometry.assign import assign
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import guard
from kdcli.methods.resolve import all_needs, find_methods, resolve_all
from kdcli.store.batch_buffers import collate_rows
from kdcli.store.reader import Row, StoreReader
from kdcli.structures import Batch, Canvas, Entries, Targets
from kdcli.tensors import Need


def open_store(
    path: Path | str, methods: str | Sequence[str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None, *, data: Path | str | None = None,
) -> Store:  # fmt: skip
    """Open the store at ``path``, a folder or a URL: its manifest and journal are checked, rows are opened when read.

    ``methods``: what is read is what these read, e.g. ``"ld,pfi"``; None: all that is stored. ``options``: of methods, as
    ``{"ld": {"imitation": "gi"}}``, over those that the store was written with. ``data``: the COCO folder that it was
    written for; batches then come with boxes and labels, and ``Store.image`` reads the image files.
    Raises MissingPathError, or StoreError for a store that is foreign, unfinished, corrupt or of other data, or that lacks
    what the methods read; OptionError for an unknown method or option, and for what is no path or no table.
    """
    side = stored_teacher(store_path(path))
    reader = side.reader
    assert reader is not None
    text = method_list(methods)
    known = find_methods(text) if text else {}
    given = {} if options is None else method_options(options, known, text)
    needs: set[Need] = {t.need for t in reader.schema.tensors} | set(reader.schema.derived_from_dense)
    if text:
        keys = default_keys(reader.manifest.teacher.detector)
        stored = reader.manifest.method_options
        needs = set(
            all_needs(known, resolve_all(known, keys, {n: {**stored.get(n, {}), **given.get(n, {})} for n in known}))
        )
    dataset = None
    if data is not None:
        record = reader.manifest.dataset
        dataset = as_stored(open_split(Path(data), record.split), record)
        require_match(reader, dataset, reader.schema.canvas, (), None)
    return Store(side, text, given, tuple(sorted(needs)), dataset)


class Store:
    """A store, made by ``open_store``. Safe in data workers, however they are started: it is pickled without open files.

    ``needs``: the teacher tensors that a batch holds. ``methods``, ``options``: as given to ``open_store``.
    """

    def __init__(
        self, teacher: TeacherSide, methods: str, options: Mapping[str, Mapping[str, Any]], needs: tuple[Need, ...],
        dataset: Dataset | None,
    ) -> None:  # fmt: skip
        reader = teacher.reader
        assert reader is not None
        self._teacher, self._dataset = teacher, dataset
        self.methods, self.options, self.needs = methods, options, needs
        self._rows = reader.restricted(needs, pixels=False)
        self._bare = reader.restricted((), pixels=False)
        self._pixels: StoreReader | None = reader.restricted((), pixels=True) if reader.schema.images else None
        self._definition = stored_definition(reader)
        self._exif = reader.manifest.dataset.exif is None
        self._assigner = reader.manifest.assigner_spec
        self._canvases: dict[int, Canvas] = {}  # by row: the orientations that were asked for

    def __repr__(self) -> str:
        return f"<Store {self.path}: {len(self.image_ids)} images, views {', '.join(self.views)}>"

    @property
    def path(self) -> str:
        """Folder or URL."""
        return str(self._rows.storage)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; a label is a position in this tuple."""
        return tuple(name for _, name in self._rows.manifest.dataset.categories)

    @property
    def views(self) -> tuple[str, ...]:
        """The views that every image was cached in, e.g. ``identity``, ``hflip``."""
        return self._rows.views

    @property
    def image_ids(self) -> tuple[int, ...]:
        """The annotation ids of the images."""
        return self._rows.image_ids

    @property
    def canvas(self) -> Canvas:
        """The canvas, which stands for its transpose too: see ``orientation``."""
        return self._rows.schema.canvas

    @property
    def grid(self) -> Grid:
        """Levels, cells and anchors of the teacher: what rows of its tensors are of."""
        return self._rows.schema.grid

    def view(self, image_id: int, name: str = "identity") -> StoreView:
        """The geometry of a row.

        Raises StoreError when the image or the view is not in the store, OptionError for an id that is no whole number.
        """
        key = row_key(image_id, name)
        row = self._bare.read(key)
        return StoreView(key, Geometry.from_array(row.geometry), row.content.hex(), self._exif)

    def image(self, image_id: int, view: str = "identity") -> Tensor:
        """The pixels that the teacher saw: [3, H, W] uint8, from the store (``--cache-images``) or the file in ``data``.

        Raises as ``view``; StoreError for a file that is not the one that the teacher saw, MissingPathError or DataError
        for one that is not there or no image, OptionError when there are neither.
        """
        key = row_key(image_id, view)
        if self._pixels is not None:
            pixels = self._pixels.read(key).image
            assert pixels is not None
            return torch.from_numpy(pixels)
        if self._dataset is None:
            raise OptionError(
                f"store '{self.path}' has no images (cache-teacher --cache-images): give data= to open_store, or read the "
                "file yourself and render it with Store.view(...).render"
            )
        found = self.view(image_id, view)
        return found.load(self._dataset.image_path(self._dataset.index_of(key.image_id)))

    def orientation(self, image_id: int, view: str = "identity") -> Canvas:
        """The orientation of the canvas that a view of an image takes: a batch must be of one. Raises as ``view``.

        Read from the row the first time (0.2 ms), where the canvas is no square.
        """
        row = self._bare.row_index(row_key(image_id, view))
        if self.canvas == self.canvas.transposed:
            return self.canvas
        if row not in self._canvases:
            self._canvases[row] = self.view(image_id, view).canvas
        return self._canvases[row]

    def batches(self, size: int, *, seed: int = 0, epoch: int = 0) -> list[list[Key]]:
        """One epoch: every image once, in one drawn view, shuffled, in batches of at most ``size`` of one orientation.

        Depends on ``seed`` and ``epoch`` alone: the order of ``kdcli distill`` with this seed and batch size. Raises
        OptionError for a size below 1.
        """
        count = batch_size(size)
        ids = np.sort(np.array(self.image_ids, np.int64))
        views = drawn_views(ids, self.views, seed, epoch)
        keys = list(zip(ids.tolist(), views, strict=True))
        sizes = [self.orientation(*key).size for key in keys]
        order = ordered_batches(ids, sizes, np.zeros(len(ids), np.int64), seed=seed, epoch=epoch, batch=count)
        return [[keys[k] for k in chunk] for chunk in order]

    def read(
        self, keys: Sequence[Key], *, device: str | torch.device = "cpu", targets: Sequence[Boxes] | None = None,
        seed: int = 0, epoch: int = 0,
    ) -> TeacherBatch:  # fmt: skip
        """Teacher tensors of a batch, decoded on ``device``: ``decode`` of ``fetch``, whose errors it raises."""
        return self.decode(self.fetch(keys, targets=targets, seed=seed, epoch=epoch), device=device)

    def fetch(
        self, keys: Sequence[Key], *, targets: Sequence[Boxes] | None = None, seed: int = 0, epoch: int = 0
    ) -> StoredRows:
        """The rows of a batch, still encoded: for a data worker, which sends 8-bit codes and not float32.

        ``keys``: (image id, view), all of one orientation. ``targets``: for each, boxes [G, 4] xyxy image pixels and
        labels [G] as they were when the store was written (no crowd, in the order of the annotations); with ``data=`` they
        are known. ``seed``, ``epoch``: of what a method draws at random in a step, as in ``kdcli distill``.
        Raises StoreError for a row that is missing, corrupt, or of other boxes; OptionError for an empty batch, one of two
        orientations, keys that are no such pairs, and targets that are not boxes and labels for each; DataError for
        boxes of another shape.
        """
        named = row_keys(keys)
        boxes_of = None if targets is None else row_targets(targets, named)
        rows = self._rows.read_all(named, shared=get_worker_info() is not None)
        views = tuple(
            StoreView(key, Geometry.from_array(row.geometry), row.content.hex(), self._exif)
            for key, row in zip(named, rows, strict=True)
        )
        canvas = one_canvas(views)
        if boxes_of is None and self._dataset is not None:
            places = [self._dataset.index_of(key.image_id) for key in named]
            boxes_of = row_targets([self._dataset.training_boxes(place) for place in places], named)
        found = self._targets(views, canvas)
        if boxes_of is not None:
            placed = [self._placed(view, row, *boxes) for view, row, boxes in zip(views, rows, boxes_of, strict=True)]
            found = replace(
                found, boxes=[boxes for boxes, _, _ in placed], labels=[labels for _, labels, _ in placed],
                assigned=torch.stack([assigned for _, _, assigned in placed]),
                draws=image_draws(named, seed, epoch),
            )  # fmt: skip
        entries = (
            Entries.collate([row.entries for row in rows if row.entries is not None])
            if rows[0].entries is not None
            else None
        )
        batch = Batch(
            images=torch.empty(len(named), 0, dtype=torch.uint8),  # methods read none
            targets=found, keys=named, entries=entries, rows=collate_rows(rows, self._rows.layout.values()),
        )  # fmt: skip
        return StoredRows(views, batch, boxes_of is not None)

    def decode(self, rows: StoredRows, *, device: str | torch.device = "cpu") -> TeacherBatch:
        """Float32 teacher tensors of ``rows``, decoded on ``device``. Raises OptionError for a device that is not there."""
        batch = rows.batch.to(pick_device(str(device)))
        tensors = self._rows.schema.decode_batch(batch, self.needs)
        return TeacherBatch(tensors, rows.views, replace(batch, rows={}), rows.has_targets, self.grid)

    def _targets(self, views: Sequence[StoreView], canvas: Canvas) -> Targets:
        return Targets(
            boxes=[], labels=[], content=torch.tensor([view.content for view in views]), canvas=canvas,
            assigned=torch.empty(len(views), 0, dtype=torch.int32),
            valid=torch.stack([self.grid.valid(canvas, view.content) for view in views]),
        )  # fmt: skip

    def _placed(self, view: StoreView, row: Row, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes of a row on the canvas, their labels, and the box of each anchor. Raises StoreError for other boxes."""
        on_canvas, keep = to_canvas(boxes, view.geometry)
        kept, named = on_canvas[keep], labels[keep]
        if row.guard != guard(kept, named, self._definition):
            raise StoreError(
                f"{view.key}: its boxes or labels are not those of the store; give those of its annotations (x1 y1 x2 y2 in "
                "image pixels, no crowd, in their order), or write the store again"
            )
        return kept, named, assign(self._assigner, self.grid, view.canvas, kept, view.content)


def one_canvas(views: Sequence[StoreView]) -> Canvas:
    """The canvas that all ``views`` share. Raises OptionError that names two when there are two."""
    first = views[0]
    for other in views:
        if other.canvas != first.canvas:
            raise OptionError(
                f"a batch is of one orientation: {first.key} has a canvas {first.canvas}, {other.key} {other.canvas}; group "
                "them by Store.orientation, or take Store.batches"
            )
    return first.canvas
