"""One stored tensor, the Zarr arrays that it becomes, and the keys of their shard files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kdcli.errors import StoreError
from kdcli.store import encodings
from kdcli.store.encodings import Encoding
from kdcli.structures import FLAGS
from kdcli.tensors import PROPOSAL_COUNT, Need, Region

TENSOR_NAME = re.compile(r"[a-z][a-z0-9_]*(/[a-z0-9_]+)*")  # it becomes a folder: no way out of the store
MAX_NAME = 64  # a file name may have 255 bytes
MAX_DIMS = 8  # numpy takes 64; the most that a tensor has is 4
PER = re.compile(r"cell|anchor|box|proposal|level[0-4]")
ENTRY_COUNT, BOX_COUNT = "entries/count", "boxes/count"
ZSTD_LEVEL = 1  # codes hardly compress; what zstd is for is the padding behind sparse rows
# no entropy coder: 8-bit features of 128 channels at 800x1344 are decompressed in 0.44 ms instead of 2.00, and are a tenth
# larger; runs of equal bytes, such as padding, are found still
ZSTD_FAST = -1


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array without its row axis."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    count: str | None = None  # path of the array that says how many of the first dim are real; None: all are
    level: int = ZSTD_LEVEL

    @property
    def sparse(self) -> bool:
        """True when only a prefix is real."""
        return self.count is not None

    @cached_property
    def row_bytes(self) -> int:
        """Raw bytes of one row."""
        return math.prod(self.shape) * self.numpy_type.itemsize

    @cached_property
    def numpy_type(self) -> np.dtype[Any]:
        """Little-endian, as it is stored."""
        return np.dtype(self.dtype).newbyteorder("<")


@dataclass(frozen=True)
class StoredTensor:
    """A need with its shape and encoding."""

    need: Need
    per: str  # what it has a row for: see TensorSpec
    dims: tuple[int, ...]
    encoding: Encoding

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "name": self.need.name,
            "region": str(self.need.region),
            "per": str(self.per),
            "dims": list(self.dims),
            "encoding": self.encoding.to_json(),
        }

    @cached_property
    def count(self) -> str | None:
        """Path of the array that counts its rows; None when it is dense."""
        if self.need.dense:
            return None
        return {str(Region.GT): BOX_COUNT, str(Region.PROPOSALS): PROPOSAL_COUNT}.get(self.need.region, ENTRY_COUNT)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> StoredTensor:
        """Inverse of ``to_json``. Raises StoreError, KeyError, TypeError or ValueError for what it cannot be."""
        name, region, per = (str(data[field]) for field in ("name", "region", "per"))
        known = region in (Region.ALL, Region.GT, Region.PROPOSALS) or is_flagged(region)
        if len(name) > MAX_NAME or not TENSOR_NAME.fullmatch(name) or not known or not PER.fullmatch(per):
            raise StoreError(
                f"unknown tensor {name[:MAX_NAME]!r} @ {region[:MAX_NAME]!r} per {per[:MAX_NAME]!r}; this store was written "
                "by a newer kdcli"
            )
        dims = tuple(whole(n) for n in data["dims"])
        if not 1 <= len(dims) <= MAX_DIMS:
            raise ValueError(f"{name} has {len(dims)} dimensions a row")
        return StoredTensor(Need(name, region), per, dims, encodings.from_json(data["encoding"]))


def whole(value: Any, least: int = 1) -> int:
    """A JSON number that counts something. Raises ValueError for another."""
    if type(value) is not int or not least <= value < 2**62:
        raise ValueError(f"{str(value)[:40]} is not a whole number of at least {least}, or too large")
    return value


def is_flagged(region: str) -> bool:
    """Whether ``region`` is one of FLAGS or a union of some, each once."""
    parts = region.split("+")
    return len(set(parts)) == len(parts) and all(part in FLAGS for part in parts)


def path_of(need: Need, suffix: str) -> str:
    """The path of the array that an encoding calls ``suffix``."""
    # '@' and '+' are legal in Zarr keys and file names; one folder per need keeps its codes and scales together
    return f"tensors/{need.key}/{suffix or 'values'}"


def shard_key(array: ArraySpec, shard: int) -> str:
    """Where Zarr's default chunk keys put a shard of ``array`` (whole trailing axes, so all other indices are 0)."""
    return "/".join([array.path, "c", str(shard), *("0" for _ in array.shape)])
