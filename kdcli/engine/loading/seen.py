"""What the image files held when a run first read them, so that one that changes under it is found by its content.

Data workers hash the bytes that they decode anyway; eight bytes of each sha256 are kept: 1 MB for COCO.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcli.data.coco import Dataset
from kdcli.engine.runtime.distributed import gathered
from kdcli.errors import OptionError, StoreError
from kdcli.structures import RowKey

KEPT_BYTES = 8


def short_digests(content_hashes: Sequence[bytes]) -> bytes:
    """What is kept of the sha256 of each file, joined."""
    return b"".join(content[:KEPT_BYTES] for content in content_hashes)


class SeenImages:
    """The digest of each image of ``dataset`` as it was read first, [num_images] int64; 0: not read yet."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._digests: NDArray[np.int64] = np.zeros(dataset.num_images, np.int64)

    def check(self, keys: Sequence[RowKey], digests: bytes) -> None:
        """Note what was read for ``keys``; ``digests`` of ``short_digests``. Raises StoreError for another content."""
        at = np.searchsorted(self._dataset.annotations.image_ids, [key.image_id for key in keys])
        found = np.frombuffer(digests, np.int64)
        known = self._digests[at]
        changed = np.flatnonzero((known != 0) & (known != found))
        if len(changed):
            position = int(at[changed[0]])
            raise StoreError(
                f"image {self._dataset.image_id(position)} ({self._dataset.image_path(position)}) is not the file that this "
                "run read before: its bytes changed; restore it, or start a new run"
            )
        self._digests[at] = found

    def to_tensor(self) -> Tensor:
        """For the state file: what all processes have read. Each of them must call it."""
        for part in gathered([self._digests]):
            self._digests = np.where(self._digests == 0, part, self._digests)
        return torch.from_numpy(self._digests.copy())

    def restore(self, saved: object) -> None:
        """Go on from ``to_tensor``. Raises OptionError for what is none of this data set."""
        if not isinstance(saved, Tensor) or saved.dtype != torch.int64 or saved.shape != self._digests.shape:
            raise OptionError("its list of images that were read is not one of this data set")
        self._digests = saved.numpy().copy()
