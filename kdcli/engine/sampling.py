"""Which image comes when, in which view: random numbers of (seed, epoch, image id) alone.

No worker has a state, so that a resumed run, a run with other workers and one on several processes see the same pixels.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcli.engine.samples import Item, SampleSource, orientation
from kdcli.structures import RowKey


def plan_epoch(
    source: SampleSource, positions: NDArray[np.int64], views: tuple[str, ...], *, seed: int, epoch: int, batch: int,
    world: int = 1, rank: int = 0,
) -> list[list[Item]]:  # fmt: skip
    """The batches of one epoch for process ``rank``: every image once, in one drawn view, one orientation a batch.

    ``positions``: images to use. ``batch``: images over all processes; a process takes a contiguous slice of each
    global batch. A short batch is kept; with several processes it is padded by repeating images of its orientation.
    """
    ids = source.dataset.annotations.image_ids[positions]
    view_draw = _mix(ids.astype(np.uint64), _salt("view", seed, epoch)) % np.uint64(len(views))
    order_key = _mix(ids.astype(np.uint64), _salt("order", seed, epoch))
    buckets: dict[str, list[Item]] = {}
    for k in np.argsort(order_key, kind="stable"):
        item = (int(positions[k]), views[int(view_draw[k])])
        buckets.setdefault(str(orientation(source, item).size), []).append(item)
    batches: list[list[Item]] = []
    for bucket in (buckets[name] for name in sorted(buckets)):
        for start in range(0, len(bucket), batch):
            chunk = bucket[start : start + batch]
            while world > 1 and len(chunk) < batch:
                chunk = chunk + bucket[: batch - len(chunk)]
            batches.append(chunk)
    draw = _mix(np.arange(len(batches), dtype=np.uint64), _salt("batches", seed, epoch))
    low, high = rank * batch // world, (rank + 1) * batch // world
    return [batches[k][low:high] for k in np.argsort(draw, kind="stable")]


def image_draws(keys: list[RowKey], seed: int, epoch: int) -> Tensor:
    """A seed for what is drawn at random about each image, [B] int64: of (seed, epoch, image id) alone."""
    ids = np.array([key.image_id for key in keys], dtype=np.int64)
    return torch.from_numpy((_mix(ids.astype(np.uint64), _salt("draw", seed, epoch)) >> np.uint64(1)).astype(np.int64))


def _salt(what: str, seed: int, epoch: int) -> np.uint64:
    digest = hashlib.blake2b(f"{what}/{seed}/{epoch}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _mix(values: NDArray[np.uint64], salt: np.uint64) -> NDArray[np.uint64]:
    """splitmix64 of ``values ^ salt``: the same numbers for ever, whatever numpy does to its generators."""
    with np.errstate(over="ignore"):
        x = (values ^ salt) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
