"""Which image comes when, in which view: random numbers of (seed, epoch, image id) alone.

No worker has a state, so that a resumed run, a run with other workers and one on several processes see the same pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcli.engine.loading.orientation import group_by_size, orientation
from kdcli.engine.loading.samples import Item, SampleSource
from kdcli.store.reader import StoreReader
from kdcli.structures import RowKey

# of a shard-local shuffle: 16 shards of ten arrays are fewer files than a reader keeps open, and put 6 % of the pairs of a
# batch into one shard, whatever the size of a shard
WINDOW_SHARDS = 16


def plan_epoch(
    source: SampleSource, positions: NDArray[np.int64], views: tuple[str, ...], *, seed: int, epoch: int, batch: int,
    world: int = 1, rank: int = 0, shuffle: Literal["full", "shards"] = "full",
) -> list[list[Item]]:  # fmt: skip
    """The batches of one epoch for process ``rank``: every image once, in one drawn view, one orientation a batch.

    ``positions``: images to use. ``batch``: images over all processes; a process takes a contiguous slice of each
    global batch. A short batch is kept; with several processes it is padded by repeating images of its orientation.
    ``shuffle``: ``shards`` shuffles the shards of the source's store, and then the images within windows of a few shards.
    """
    ids = source.dataset.annotations.image_ids[positions]
    items = list(zip(positions.tolist(), drawn_views(ids, views, seed, epoch), strict=True))
    window = np.zeros(len(items), np.int64)
    if shuffle == "shards":
        assert source.reader is not None
        keys = [RowKey(int(i), view) for i, (_, view) in zip(ids, items, strict=True)]
        window = shard_windows(source.reader, keys, seed, epoch)
    sizes = [orientation(source, item).size for item in items]
    batches = ordered_batches(ids, sizes, window, seed=seed, epoch=epoch, batch=batch, padded=world > 1)
    low, high = rank * batch // world, (rank + 1) * batch // world
    return [[items[k] for k in chunk[low:high]] for chunk in batches]


def drawn_views(ids: NDArray[np.int64], views: tuple[str, ...], seed: int, epoch: int) -> list[str]:
    """The view in which each image of ``ids`` is seen in this epoch."""
    draw = _mix(ids.astype(np.uint64), _salt("view", seed, epoch)) % np.uint64(len(views))
    return [views[int(v)] for v in draw]


def ordered_batches(
    ids: NDArray[np.int64], sizes: Sequence[tuple[int, int]], window: NDArray[np.int64], *, seed: int, epoch: int, batch: int,
    padded: bool = False,
) -> list[list[int]]:  # fmt: skip
    """Positions in ``ids`` (images, each in a view of the orientation in ``sizes``), shuffled and cut into batches.

    ``window``: of each, see ``shard_windows``. ``padded``: a short batch is filled up with images of its orientation.
    """
    order_key = _mix(ids.astype(np.uint64), _salt("order", seed, epoch))
    order = np.lexsort((order_key, window)).tolist()
    groups = group_by_size([sizes[k] for k in order])
    batches: list[list[int]] = []
    due = []  # the window of a batch's last image: what is left of a window goes with the next one
    for bucket in ([order[i] for i in groups[size]] for size in sorted(groups, key=str)):
        for start in range(0, len(bucket), batch):
            chunk = bucket[start : start + batch]
            due.append(window[chunk[-1]])
            while padded and len(chunk) < batch:
                chunk = chunk + bucket[: batch - len(chunk)]
            batches.append(chunk)
    draw = _mix(np.arange(len(batches), dtype=np.uint64), _salt("batches", seed, epoch))
    return [batches[k] for k in np.lexsort((draw, due))]


def shard_windows(reader: StoreReader, keys: list[RowKey], seed: int, epoch: int) -> NDArray[np.int64]:
    """The window [n], counted from 0, in which each of ``keys`` comes: the shards in random order, cut into equal parts.

    A window has 16 shards, or a few more where their number does not divide; below 32 shards there is one window.
    """
    shards, member = np.unique([reader.shard_of(key) for key in keys], return_inverse=True)
    place = np.argsort(np.argsort(_mix(shards.astype(np.uint64), _salt("shards", seed, epoch)), kind="stable"))
    windows: NDArray[np.int64] = (place * max(1, len(shards) // WINDOW_SHARDS) // len(shards))[member]
    return windows


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
