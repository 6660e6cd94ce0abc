"""How a float32 teacher tensor becomes stored numbers, and back.

An encoding is a frozen description with a JSON form ``{"name": ..., ...}``. ``encode`` runs on the CPU (numpy) for one
row; ``decode`` runs on the training device (torch) for a batch, so that 8-bit codes are what travels. Every encoding
but float32 is lossy, and its error is measured while a store is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcli.errors import StoreError

Arrays = dict[str, NDArray[Any]]
Layout = dict[str, tuple[tuple[int, ...], str]]  # suffix -> (shape of one row, dtype)


class Encoding(Protocol):
    """One way to store a tensor of ``count`` rows with trailing ``dims``; ``sizes`` are the cells or anchors a level."""

    def layout(self, count: int, dims: tuple[int, ...], sizes: tuple[int, ...]) -> Layout:
        """Arrays to allocate, by suffix (``""`` is the main one)."""
        ...

    def encode(self, value: NDArray[np.float32], valid: NDArray[np.bool_] | None, sizes: tuple[int, ...]) -> Arrays:
        """Codes of one row, [count, *dims]; rows that are not ``valid`` become code 0."""
        ...

    def decode(self, arrays: Mapping[str, Tensor], sizes: tuple[int, ...]) -> Tensor:
        """Float32 values; arrays carry the same suffixes, with any leading dims."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Name and parameters."""
        ...


@dataclass(frozen=True)
class Float:
    """Plain float32 (lossless) or float16."""

    dtype: str = "float32"

    def layout(self, count: int, dims: tuple[int, ...], sizes: tuple[int, ...]) -> Layout:
        return {"": ((count, *dims), self.dtype)}

    def encode(self, value: NDArray[np.float32], valid: NDArray[np.bool_] | None, sizes: tuple[int, ...]) -> Arrays:
        out = value.astype(self.dtype)
        if valid is not None:
            out[~valid] = 0
        return {"": out}

    def decode(self, arrays: Mapping[str, Tensor], sizes: tuple[int, ...]) -> Tensor:
        return arrays[""].float()

    def to_json(self) -> dict[str, Any]:
        return {"name": self.dtype}


@dataclass(frozen=True)
class LogOdds8:
    """uint8 steps of log-odds between ``low`` and ``high``: for dense class logits, whose tails carry the loss."""

    low: float = -12.0
    high: float = 8.0

    def layout(self, count: int, dims: tuple[int, ...], sizes: tuple[int, ...]) -> Layout:
        return {"": ((count, *dims), "uint8")}

    def encode(self, value: NDArray[np.float32], valid: NDArray[np.bool_] | None, sizes: tuple[int, ...]) -> Arrays:
        step = (self.high - self.low) / 255
        codes = np.rint((np.clip(value, self.low, self.high) - self.low) / step).astype(np.uint8)
        if valid is not None:
            codes[~valid] = 0
        return {"": codes}

    def decode(self, arrays: Mapping[str, Tensor], sizes: tuple[int, ...]) -> Tensor:
        value = to_float(arrays[""])
        # in one pass instead of two: 0.8 ms instead of 1.2 for 80 classes at 800x1344, on one core
        return torch.add(torch.tensor(self.low), value, alpha=(self.high - self.low) / 255, out=value)

    def to_json(self) -> dict[str, Any]:
        return {"name": "log_odds_8", "low": self.low, "high": self.high}


@dataclass(frozen=True)
class VectorAffine:
    """Codes of ``bits`` bits in uint8, affine per last-dimension vector: one (scale, offset) per edge of a box
    distribution [count, 4, E], or per cell of sparse features [count, C].

    A softmax ignores what all bins share, so float16 offsets cost nothing; codes are computed from the rounded pair. Fewer
    bits stay a byte each: zstd's entropy coder packs them, as well as a code that follows their distribution can.
    """

    bits: int = 8

    @property
    def steps(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def layout(self, count: int, dims: tuple[int, ...], sizes: tuple[int, ...]) -> Layout:
        return {"": ((count, *dims), "uint8"), "affine": ((count, *dims[:-1], 2), "float16")}

    def encode(self, value: NDArray[np.float32], valid: NDArray[np.bool_] | None, sizes: tuple[int, ...]) -> Arrays:
        low, high = value.min(axis=-1), value.max(axis=-1)
        offset = _float16(low, toward=-np.inf)
        scale = _float16((high - offset.astype(np.float32)) / self.steps, toward=np.inf)
        affine = np.stack([scale, offset], axis=-1)
        codes = _quantise(value, scale.astype(np.float32)[..., None], offset.astype(np.float32)[..., None], self.steps)
        if valid is not None:
            codes[~valid], affine[~valid] = 0, 0
        return {"": codes, "affine": affine}

    def decode(self, arrays: Mapping[str, Tensor], sizes: tuple[int, ...]) -> Tensor:
        affine = arrays["affine"].float()
        return to_float(arrays[""]).mul_(affine[..., :1]).add_(affine[..., 1:])

    def to_json(self) -> dict[str, Any]:
        return {"name": f"vector_affine_{self.bits}"}


@dataclass(frozen=True)
class ChannelAffine:
    """Codes of ``bits`` bits in uint8, affine per level and channel: for dense features [P, C], whose range differs by
    both.
    """

    bits: int = 8

    @property
    def steps(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def layout(self, count: int, dims: tuple[int, ...], sizes: tuple[int, ...]) -> Layout:
        return {"": ((count, *dims), "uint8"), "affine": ((len(sizes), 2, *dims), "float32")}

    def encode(self, value: NDArray[np.float32], valid: NDArray[np.bool_] | None, sizes: tuple[int, ...]) -> Arrays:
        codes = np.zeros(value.shape, np.uint8)
        affine = np.zeros((len(sizes), 2, *value.shape[1:]), np.float32)
        for level, part, inside in _levels(valid, sizes):
            keep = slice(None) if inside.all() else inside
            level_value = value[part][keep]
            offset = level_value.min(axis=0)
            scale = (level_value.max(axis=0) - offset) / np.float32(self.steps)
            affine[level] = scale, offset
            codes[part][keep] = _quantise(level_value, scale, offset, self.steps)
        return {"": codes, "affine": affine}

    def decode(self, arrays: Mapping[str, Tensor], sizes: tuple[int, ...]) -> Tensor:
        return _affine_by_level(arrays[""], arrays["affine"], sizes)

    def to_json(self) -> dict[str, Any]:
        return {"name": f"channel_affine_{self.bits}"}


@dataclass(frozen=True)
class Box16:
    """int16, affine per level and axis: for dense boxes [N, 4] xyxy in canvas pixels.

    Boxes of a level spread a little over the canvas: 65,535 steps of 1,600 px are 0.02 px each. float16 would round a
    coordinate above 1,024 to whole pixels. Both ends of a box share scale and offset, so that a box without width (FCOS
    gives some) keeps none, and the ends never change places.
    """

    def layout(self, count: int, dims: tuple[int, ...], sizes: tuple[int, ...]) -> Layout:
        return {"": ((count, *dims), "int16"), "affine": ((len(sizes), 2, *dims), "float32")}

    def encode(self, value: NDArray[np.float32], valid: NDArray[np.bool_] | None, sizes: tuple[int, ...]) -> Arrays:
        codes = np.zeros(value.shape, np.int16)
        affine = np.zeros((len(sizes), 2, *value.shape[1:]), np.float32)
        for level, part, inside in _levels(valid, sizes):
            exact = value[part][inside].astype(np.float64)
            low, high = exact.min(axis=0), exact.max(axis=0)
            low = np.minimum(low, np.roll(low, 2))  # x1 with x2, y1 with y2
            high = np.maximum(high, np.roll(high, 2))
            scale = ((high - low) / 65535).astype(np.float32)
            middle = ((high + low) / 2).astype(np.float32)
            affine[level] = scale, middle
            safe = np.where(scale > 0, scale, np.float32(1)).astype(np.float64)
            codes[part][inside] = np.clip(np.rint((exact - middle) / safe), -32768, 32767)
        return {"": codes, "affine": affine}

    def decode(self, arrays: Mapping[str, Tensor], sizes: tuple[int, ...]) -> Tensor:
        return _affine_by_level(arrays[""], arrays["affine"], sizes)

    def to_json(self) -> dict[str, Any]:
        return {"name": "box_16"}


FLOAT32 = Float("float32")
FLOAT16 = Float("float16")


def from_json(data: Mapping[str, Any]) -> Encoding:
    """The encoding that ``to_json`` described. Raises StoreError for one that this version does not know."""
    found = _known(dict(data))
    if found is None or found.to_json() != data:  # a parameter too many changes what the codes mean
        raise StoreError(f"unknown encoding {str(dict(data))[:200]}; this store was written by a newer kdcli")
    return found


def _known(data: Mapping[str, Any]) -> Encoding | None:
    match data:
        case {"name": "float32" | "float16" as dtype}:
            return Float(dtype)
        case {"name": "log_odds_8", "low": float(low), "high": float(high)} if -np.inf < low < high < np.inf:
            return LogOdds8(low, high)
        case {"name": str(name)} if found := re.fullmatch(r"(vector|channel)_affine_([4-8])", name):
            return (VectorAffine if found[1] == "vector" else ChannelAffine)(int(found[2]))
        case {"name": "box_16"}:
            return Box16()
    return None


def _quantise(
    value: NDArray[np.float32], scale: NDArray[np.float32], offset: NDArray[np.float32], steps: int
) -> NDArray[np.uint8]:
    # a constant vector has scale 0: all its codes are 0 and decode to the offset
    safe = np.where(scale > 0, scale, np.float32(1))
    codes = value - offset
    codes /= safe  # in place: a map of 1,704 x 128 is 0.9 MB, and each temporary costs 0.05 ms
    np.rint(codes, out=codes)
    return np.clip(codes, 0, steps, out=codes).astype(np.uint8)


def to_float(codes: Tensor) -> Tensor:
    """A float32 copy. On a CPU in memory of numpy's, which asks the system for huge pages.

    What torch allocates there is often handed back after each step and got again page by page: the dense tensors of two
    images at 800x1344 are 9,000 pages of 4 kB, with which decoding took 34 ms instead of 14, on an EPYC.
    """
    if codes.device.type != "cpu":
        return codes.float()
    return torch.from_numpy(np.empty(codes.shape, np.float32)).copy_(codes)


def _levels(valid: NDArray[np.bool_] | None, sizes: tuple[int, ...]) -> Iterator[tuple[int, slice, NDArray[np.bool_]]]:
    """Each level that has a valid row: its number, its rows, and which of them are valid."""
    start = 0
    for level, size in enumerate(sizes):
        part = slice(start, start + size)
        start += size
        inside = np.ones(size, bool) if valid is None else valid[part]
        if inside.any():
            yield level, part, inside


def _affine_by_level(codes: Tensor, affine: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """codes [B, rows, D] * scale + offset, with ``affine`` [B, levels, 2, D] of each level's ``sizes`` rows."""
    out = to_float(codes)
    start = 0
    for level, size in enumerate(sizes):
        part = out[:, start : start + size]
        start += size
        torch.addcmul(affine[:, level, 1, None], part, affine[:, level, 0, None], out=part)
    return out


def _float16(value: NDArray[np.float32], *, toward: float) -> NDArray[np.float16]:
    """Round outward, so that the 255 steps still span the whole range."""
    rounded = value.astype(np.float16)
    short = rounded.astype(np.float32) < value if toward > 0 else rounded.astype(np.float32) > value
    return np.where(short, np.nextafter(rounded, np.float16(toward)), rounded)
