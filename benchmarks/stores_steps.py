"""Training steps whose teacher is nobody, a live network, kdcli's store or a folder of dense files: one TrainStep for all."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stores_formats import DenseRows
from stores_reading import now

from kdcli.engine.loading.loader import Loader
from kdcli.engine.loading.samples import Item, LoadedImage, Sample, SampleSource
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training import run_config
from kdcli.engine.training.setup import prepare
from kdcli.engine.training.trainer import Trainer
from kdcli.store.batch_buffers import BatchSlot
from kdcli.structures import Batch

Endless = Iterator[tuple[Batch, int]]


@dataclass(frozen=True)
class FileSource(SampleSource):
    """Samples whose teacher arrays come from dense files. The regions are computed here: the files do not have them."""

    def fetch(self, items: Sequence[Item], slots: Sequence[BatchSlot | None] | None = None) -> list[LoadedImage]:
        """See SampleSource; the teacher's rows are read when the entries are known."""
        return SampleSource.fetch(replace(self, reader=None), items)

    def complete(self, item: Item, fetched: LoadedImage) -> Sample:
        """See SampleSource."""
        rows: Any = self.reader
        sample = super().complete(item, fetched)
        return replace(sample, arrays=rows.read(sample.key, sample.entries).arrays)


def make_trainer(
    args: argparse.Namespace, method: str, kind: str, store: Path, rows: DenseRows | None, workers: int
) -> Trainer:
    """A run that writes nothing. ``kind``: ``plain``, ``live``, ``kdcli``, or a format whose ``rows`` are given."""
    side: dict[str, Any] = {"teacher": args.teacher} if kind == "live" else {"cache": str(store)}
    given = {
        "data": args.data, "canvas": args.canvas, "epochs": 1000, "batch": args.batch, "micro_batch": args.batch,
        "amp": args.amp, "workers": workers, "device": args.device,
        "model": {"name": args.model, "fpn_channels": args.channels, "tower_convs": args.towers},
        **({} if kind == "plain" else {"method": method, **side}),
    }  # fmt: skip
    request = run_config.from_flags("train" if kind == "plain" else "distill", given, {}, None, {})
    setup = prepare(request.options(), frozenset(given), NullReporter())
    if rows is not None:
        assert setup.teacher is not None
        parts: dict[str, Any] = {f.name: getattr(setup.source, f.name) for f in fields(SampleSource)}
        forward = partial(rows.schema.decode_batch, needs=tuple(t.need for t in rows.schema.tensors))
        setup = replace(
            setup, source=FileSource(**{**parts, "reader": rows}),
            teacher=replace(setup.teacher, forward=forward),
        )  # fmt: skip
    return Trainer(setup, Path(), NullReporter())


def endless(trainer: Trainer) -> Endless:
    """Batches of epoch after epoch."""
    loader = Loader(trainer.setup.source, trainer.setup.workers)
    for epoch in itertools.count():
        plan = trainer._plan(epoch)
        for batch in loader.batches(plan):
            yield batch, len(plan)


def steps(trainer: Trainer, batches: Endless, count: int) -> NDArray[np.float64]:
    """Time (see now) for ``count`` steps: by the clock with waiting for data, by the processor without data workers."""
    began = now()
    for batch, length in itertools.islice(batches, count):
        trainer.state.batch = 1  # the gradient shares are measured once an epoch, not in a usual step
        trainer._train_batch(batch, length)
        trainer.state.step += 1
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return now() - began


def compare(trainers: Mapping[str, Trainer], rounds: int, count: int) -> dict[str, NDArray[np.float64]]:
    """Time [rounds, 2] of a step of each trainer in each round, in turns."""
    running = {name: (trainer, endless(trainer)) for name, trainer in trainers.items()}
    for parts in running.values():
        steps(*parts, count)  # not counted: the first steps of a process are slower
    seconds: dict[str, list[Any]] = {name: [] for name in running}
    names = list(running)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(steps(*running[name], count) / count)
    return {name: np.stack(values) for name, values in seconds.items()}


def median_ratio(values: Iterable[float], base: Iterable[float]) -> float:
    """Median over the rounds of a ratio within each."""
    return statistics.median(a / b for a, b in zip(values, base, strict=True))
