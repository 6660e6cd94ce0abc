"""Data workers: samples and batches in a planned order, made ahead, and how they travel to the process that asked.

A tensor that leaves a process costs a file descriptor and 0.2 ms of either side, whatever its size; an array goes through a
pipe, for 0.05 ms at 60 kB. So what is small travels as arrays.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from kdcli.data.coco import Dataset
from kdcli.engine.loading.samples import Item, Sample, SampleSource, collate
from kdcli.engine.loading.seen import SeenImages, short_digests
from kdcli.engine.loading.workers import attempt, batches_ahead, begin, made_by
from kdcli.engine.runtime.threads import thread_pool
from kdcli.errors import KDError
from kdcli.store.reader import StoreReader
from kdcli.structures import Batch, Entries

PIPE_BYTES = 2**16  # of 240 kB an array takes longer than a tensor
NOTHING = -1  # no image: a worker computes, or waits
_Change = Callable[[Any], Any]


class Loader:
    """Batches (or lists of samples) in a planned order, made ahead by ``workers`` processes.

    0: in this one, when they are asked for; files are read by as many threads as torch has. ``seen``: what their images
    must still be.
    """

    def __init__(self, source: SampleSource, workers: int, seen: SeenImages | None = None) -> None:
        self.source = source
        self._seen = seen
        self._plan = _Plan()
        self._workers = workers
        self._at = multiprocessing.RawArray("q", [NOTHING] * workers)  # the image that each worker reads
        self._loaders: dict[Callable[..., Any], DataLoader[Any]] = {}

    def samples(self, batches: list[list[Item]]) -> Iterator[list[Sample]]:
        """The samples of each planned batch.

        Raises the first error that a worker met, WorkerError when one dies, StoreError for a changed image.
        """
        for packed in self._run(batches, _samples_to_wire, 0):
            if self._seen is not None:
                self._seen.check([p.key for p in packed], short_digests([p.content_hash for p in packed]))
            yield [_samples_from_wire(p) for p in packed]

    def batches(self, batches: list[list[Item]]) -> Iterator[Batch]:
        """Collated batches in the planned order. Raises as ``samples``, and NoSpaceError without shared memory for them."""
        size = max(map(len, batches), default=0) * self._shared_bytes()
        for wire in self._run(batches, functools.partial(_to_wire, self.source.reader), size):
            batch = _from_wire(wire)
            if self._seen is not None:
                self._seen.check(batch.keys, batch.digests)
            yield batch

    def _shared_bytes(self) -> int:
        """What travels of one image in shared memory: its canvas, and large rows of a store."""
        layout = () if self.source.reader is None else self.source.reader.layout.values()
        height, width = self.source.canvas.size
        return 3 * height * width + sum(a.row_bytes for a in layout if not a.sparse and a.row_bytes > PIPE_BYTES)

    def _run(self, batches: list[list[Item]], collate_fn: Callable[..., Any], shared: int) -> Iterator[Any]:
        loaded = self._ahead(batches, collate_fn, shared) if self._workers else self._here(batches, collate_fn)
        for made in loaded:
            if isinstance(made, KDError):
                raise made
            yield made

    def _here(self, batches: list[list[Item]], collate_fn: Callable[..., Any]) -> Iterator[Any]:
        with thread_pool(torch.get_num_threads(), "load") as pool:
            for items in batches:
                yield collate_fn(self.source.load_batch(items, pool.map))

    def _ahead(self, batches: list[list[Item]], collate_fn: Callable[..., Any], shared: int) -> Iterator[Any]:
        self._plan.batches = batches
        kind = collate_fn.func if isinstance(collate_fn, functools.partial) else collate_fn
        if kind not in self._loaders:
            self._loaders[kind] = DataLoader(
                _Loadable(self.source, self._at),
                batch_sampler=self._plan,  # items are (position, view), not numbers
                num_workers=self._workers,
                collate_fn=functools.partial(_collated, collate_fn),
                worker_init_fn=begin,
                persistent_workers=True,
                prefetch_factor=batches_ahead(shared, self._workers),
                # of its own: DataLoader draws a seed at each pass, which must not move the run's random state
                generator=torch.Generator().manual_seed(0),
            )
        yield from made_by(self._loaders[kind], functools.partial(_reading, self.source.dataset, self._at))


def _reading(dataset: Dataset, at: Any, worker: int) -> str:
    return "" if at[worker] == NOTHING else f" while it read {dataset.image_path(at[worker])}"


class _Loadable(TorchDataset[Any]):
    """What DataLoader wants. ``at``: where each worker notes the position of the image that it reads."""

    def __init__(self, source: SampleSource, at: Any) -> None:
        self.source, self._at = source, at

    def __getitems__(self, items: list[Item]) -> list[Sample | KDError] | KDError | OSError:
        return attempt(self.source.load_batch, items, self._noted)

    def _noted(self, fetch: Callable[[Any], Any], images: Iterable[Any]) -> Iterator[Any]:
        """``map``, noting which image it is at."""
        info = get_worker_info()
        assert info is not None
        for views in images:
            self._at[info.id] = views[0][0][0]
            yield fetch(views)
            self._at[info.id] = NOTHING


class _Plan:
    """A batch sampler whose list of batches is set before each pass, so that workers live through all epochs."""

    def __init__(self) -> None:
        self.batches: list[list[Item]] = []

    def __iter__(self) -> Iterator[list[Item]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _collated(collate_fn: Callable[..., Any], found: Any) -> Any:
    """What a worker sends."""
    return found if isinstance(found, KDError | OSError) else attempt(collate_fn, found)


def _to_wire(reader: StoreReader | None, samples: list[Sample | KDError]) -> Any:
    """A batch as it travels, its boxes end to end, and how many boxes each image has."""
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, KDError):
            return sample
        good.append(sample)
    batch = collate(good, reader)
    counts = [len(b) for b in batch.targets.boxes]
    boxes, labels = torch.cat(batch.targets.boxes), torch.cat(batch.targets.labels)
    batch = replace(batch, targets=replace(batch.targets, boxes=[boxes], labels=[labels]))
    return _batch(batch, _on_its_way), counts


def _on_its_way(tensor: Tensor) -> Any:
    if tensor.nbytes <= PIPE_BYTES:
        return tensor.numpy()
    # here and not by the thread that sends it: what fails there reaches nobody
    return tensor.share_memory_() if get_worker_info() else tensor


def _from_wire(wire: tuple[Batch, list[int]]) -> Batch:
    batch = _batch(wire[0], _as_tensor)
    boxes = list(torch.split(batch.targets.boxes[0], wire[1]))
    labels = list(torch.split(batch.targets.labels[0], wire[1]))
    return replace(batch, targets=replace(batch.targets, boxes=boxes, labels=labels))


def _samples_to_wire(samples: list[Sample | KDError]) -> Any:
    """Samples as they travel: images too, since eight of them would be eight tensors."""
    for sample in samples:
        if isinstance(sample, KDError):
            return sample
    return [_sample(s, lambda tensor: tensor.numpy()) for s in samples if isinstance(s, Sample)]


def _samples_from_wire(sample: Sample) -> Sample:
    return _sample(sample, _as_tensor)


def _as_tensor(value: Any) -> Tensor:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


# each of these applies ``change`` to every tensor


def _sample(sample: Sample, change: _Change) -> Sample:
    names = ("image", "boxes", "labels", "assigned", "valid")
    return replace(
        sample, slot=None, entries=_entries(sample.entries, change), **{n: change(getattr(sample, n)) for n in names}
    )  # fmt: skip


def _batch(batch: Batch, change: _Change) -> Batch:
    target = batch.targets
    targets = replace(
        target, boxes=[change(b) for b in target.boxes], labels=[change(x) for x in target.labels],
        **{n: change(getattr(target, n)) for n in ("content", "assigned", "valid")},
    )  # fmt: skip
    rows = {path: change(value) for path, value in batch.rows.items()}
    return replace(
        batch, images=change(batch.images), targets=targets, entries=_entries(batch.entries, change), rows=rows
    )  # fmt: skip


def _entries(entries: Entries | None, change: _Change) -> Entries | None:
    names = ("index", "flag", "gt", "weight", "image")
    return None if entries is None else replace(entries, **{n: change(getattr(entries, n)) for n in names})
