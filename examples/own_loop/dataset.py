"""A torch Dataset of a store, for any DataLoader: python dataset.py DATA STORE [fork|spawn]

Workers render the pixels that the teacher saw and read its rows as they are stored, in 8 bits; the process that trains
decodes them on its device. The store is opened once and sent to the workers without open files.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import kdcli

Key = tuple[int, str]  # image id in the annotations, view


@dataclass(frozen=True)
class TeacherDataset(Dataset[tuple[Key, Tensor]]):
    """Indexed by (image id, view): ``Store.batches`` gives batches of them, for ``batch_sampler``."""

    store: kdcli.Store

    def __getitem__(self, key: Key) -> tuple[Key, Tensor]:
        """The key, and the pixels that the teacher saw, [3, H, W] uint8."""
        return key, self.store.image(*key)

    def collate(self, samples: list[tuple[Key, Tensor]]) -> tuple[Tensor, kdcli.StoredRows]:
        """Images [B, 3, H, W] uint8, and the rows of the batch with its boxes; runs in the worker too."""
        return torch.stack([image for _, image in samples]), self.store.fetch([key for key, _ in samples])


def make_loader(store: kdcli.Store, batch: int, epoch: int, workers: int, start: str | None) -> DataLoader[Key]:
    """The batches of one epoch."""
    dataset = TeacherDataset(store)
    return DataLoader(
        dataset, batch_sampler=store.batches(batch, epoch=epoch), collate_fn=dataset.collate, num_workers=workers,
        multiprocessing_context=start,
    )  # fmt: skip


def main(data: str, path: str, start: str = "spawn") -> int:
    """Count the images of an epoch that come with teacher features and boxes."""
    store = kdcli.open_store(path, "pkd", data=data)
    seen = 0
    for images, rows in make_loader(store, batch=4, epoch=0, workers=1, start=start):
        teacher = store.decode(rows, device="cpu")
        assert len(images) == len(teacher.tensors["features@all"]) == len(teacher.boxes)
        seen += len(images)
    print(f"{seen} images, {start}")
    return seen


if __name__ == "__main__":
    main(*sys.argv[1:4])
