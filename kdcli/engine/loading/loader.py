"""Data workers: samples and batches in a planned order, made ahead, and how they travel to the process that asked.

A tensor that leaves a process costs a file descriptor and 0.2 ms of either side, whatever its size; an array goes through a
pipe, for 0.05 ms at 60 kB. So what is small travels as arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdcli.engine.loading.samples import Item, Sample, SampleSource, collate
from kdcli.engine.loading.seen import SeenImages, short_digests
from kdcli.engine.runtime.threads import thread_pool
from kdcli.errors import KDError
from kdcli.store.reader import StoreReader
from kdcli.structures import Batch, Entries

PIPE_BYTES = 2**16  # of 240 kB an array takes longer than a tensor
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
        self._loaders: dict[Callable[..., Any], DataLoader[Any]] = {}

    def samples(self, batches: list[list[Item]]) -> Iterator[list[Sample]]:
        """The samples of each planned batch. Raises the first error that a worker met, StoreError for a changed image."""
        for packed in self._run(batches, _samples_to_wire):
            if self._seen is not None:
                self._seen.check([p.key for p in packed], short_digests([p.content_hash for p in packed]))
            yield [_samples_from_wire(p) for p in packed]

    def batches(self, batches: list[list[Item]]) -> Iterator[Batch]:
        """Collated batches in the planned order. Raises the first error that a worker met, StoreError for a changed image."""
        for wire in self._run(batches, functools.partial(_to_wire, self.source.reader)):
            batch = _from_wire(wire)
            if self._seen is not None:
                self._seen.check(batch.keys, batch.digests)
            yield batch

    def _run(self, batches: list[list[Item]], collate_fn: Callable[..., Any]) -> Iterator[Any]:
        loaded = self._ahead(batches, collate_fn) if self._workers else self._here(batches, collate_fn)
        for made in loaded:
            if isinstance(made, KDError):
                raise made
            yield made

    def _here(self, batches: list[list[Item]], collate_fn: Callable[..., Any]) -> Iterator[Any]:
        with thread_pool(torch.get_num_threads(), "load") as pool:
            for items in batches:
                yield collate_fn(self.source.load_batch(items, pool.map))

    def _ahead(self, batches: list[list[Item]], collate_fn: Callable[..., Any]) -> Iterator[Any]:
        self._plan.batches = batches
        kind = collate_fn.func if isinstance(collate_fn, functools.partial) else collate_fn
        if kind not in self._loaders:
            self._loaders[kind] = DataLoader(
                _Loadable(self.source),
                batch_sampler=self._plan,  # items are (position, view), not numbers
                num_workers=self._workers,
                collate_fn=collate_fn,
                persistent_workers=True,
                prefetch_factor=4,
                # of its own: DataLoader draws a seed at each pass, which must not move the run's random state
                generator=torch.Generator().manual_seed(0),
            )
        yield from self._loaders[kind]


class _Loadable(Dataset[Any]):
    """What DataLoader wants."""

    def __init__(self, source: SampleSource) -> None:
        self.source = source

    def __getitems__(self, items: list[Item]) -> list[Sample | KDError]:
        return self.source.load_batch(items)


class _Plan:
    """A batch sampler whose list of batches is set before each pass, so that workers live through all epochs."""

    def __init__(self) -> None:
        self.batches: list[list[Item]] = []

    def __iter__(self) -> Iterator[list[Item]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


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
    return _batch(batch, lambda tensor: tensor.numpy() if tensor.nbytes <= PIPE_BYTES else tensor), counts


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
