"""A batch as two training processes see it, in one process: what each adds to a sum over all of them is played back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from kdcli import tensors

Terms = dict[str, Tensor]


@contextmanager
def _reducing(all_reduce: Callable[[Tensor], None]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "world_size", lambda: 2)
        patch.setattr("torch.distributed.all_reduce", all_reduce)
        yield


def on_two_processes(first: Callable[[], Terms], second: Callable[[], Terms]) -> Terms:
    """The mean of the terms of two processes, which is what DDP makes of their gradients."""
    records: list[list[Tensor]] = []
    for work in (first, second):
        mine: list[Tensor] = []
        with _reducing(lambda value, mine=mine: mine.append(value.clone())):  # type: ignore[misc]
            work()
        records.append(mine)
    assert len(records[0]) == len(records[1]) > 0  # or the processes would wait for each other for ever
    results = []
    for work in (first, second):
        sums = iter([a + b for a, b in zip(*records, strict=True)])
        with _reducing(lambda value, sums=sums: value.copy_(next(sums))):  # type: ignore[misc]
            results.append(work())
    return {name: torch.stack([result[name] for result in results]).mean() for name in results[0]}
