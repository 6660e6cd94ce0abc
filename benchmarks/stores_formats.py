"""The ways teacher outputs are kept on a disk today: dense, one file an image or a few large ones.

Each is a ``Format``: ``write`` puts the dense tensors of all rows into a folder, ``open`` gives a function from a row's
number to its dense tensors. ``DenseRows`` turns them into what a training loader needs, under the names of a lossless
store, so that collating, decoding and the step are kdcli's own for every format.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcli.store.arrays import ArraySpec
from kdcli.store.schema import StoreSchema
from kdcli.structures import Entries, RowKey

Dense = dict[str, NDArray[np.float32]]  # by tensor name: [P or N, *dims] of one row, every cell of it
Shapes = Mapping[str, tuple[int, ...]]
ROWS_A_SHARD = 64  # of the safetensors shards


@dataclass(frozen=True)
class Format:
    """One way to keep dense tensors. ``files``: the format that writes what this one reads, when it is another."""

    title: str
    write: Callable[[Path, Sequence[Dense]], None]
    open: Callable[[Path, Shapes], Callable[[int], Dense]]
    module: str = "numpy"
    files: str = ""

    @property
    def lacking(self) -> str | None:
        """Why it cannot be measured here; None when it can."""
        found = importlib.util.find_spec(self.module)
        return f"{self.module} is not installed" if found is None else None


def write_npy(folder: Path, rows: Sequence[Dense]) -> None:
    """A file a row: all values one after another, so that one read gets them."""
    for number, row in enumerate(rows):
        np.save(folder / f"{number}.npy", np.concatenate([value.ravel() for value in row.values()]))


def open_npy(folder: Path, shapes: Shapes) -> Callable[[int], Dense]:
    """Whole files, read into memory."""
    return lambda number: _split(np.load(folder / f"{number}.npy"), shapes)


def open_npy_map(folder: Path, shapes: Shapes) -> Callable[[int], Dense]:
    """The same files, memory-mapped: what is not looked at is not read."""
    return lambda number: _split(np.asarray(np.load(folder / f"{number}.npy", mmap_mode="c")), shapes)


def write_pt(folder: Path, rows: Sequence[Dense]) -> None:
    """A file a row, of torch.save."""
    for number, row in enumerate(rows):
        torch.save({name: torch.from_numpy(value) for name, value in row.items()}, folder / f"{number}.pt")


def open_pt(folder: Path, shapes: Shapes) -> Callable[[int], Dense]:
    """With torch.load, plain tensors only."""

    def read(number: int) -> Dense:
        return {n: t.numpy() for n, t in torch.load(folder / f"{number}.pt", weights_only=True).items()}

    return read


def write_hdf5(folder: Path, rows: Sequence[Dense]) -> None:
    """One file, one contiguous float32 data set a tensor."""
    import h5py

    with h5py.File(folder / "rows.h5", "w") as file:
        for name, value in rows[0].items():
            file.create_dataset(name, (len(rows), *value.shape), "f4")
        for number, row in enumerate(rows):
            for name, value in row.items():
                file[name][number] = value


def open_hdf5(folder: Path, shapes: Shapes) -> Callable[[int], Dense]:
    """Row by row from the open file."""
    import h5py

    file = h5py.File(folder / "rows.h5", "r")
    sets = {name: file[name] for name in shapes}
    return lambda number: {name: np.asarray(values[number]) for name, values in sets.items()}


def write_safetensors(folder: Path, rows: Sequence[Dense]) -> None:
    """Shards of 64 rows in float16."""
    from safetensors.numpy import save_file

    for start in range(0, len(rows), ROWS_A_SHARD):
        shard = {
            f"{start + k}/{name}": value.astype(np.float16)
            for k, row in enumerate(rows[start : start + ROWS_A_SHARD])
            for name, value in row.items()
        }
        save_file(shard, folder / f"{start // ROWS_A_SHARD}.safetensors")


def open_safetensors(folder: Path, shapes: Shapes) -> Callable[[int], Dense]:
    """From open shards, converted to float32."""
    from safetensors import safe_open

    files: dict[int, Any] = {}

    def read(number: int) -> Dense:
        shard = number // ROWS_A_SHARD
        if shard not in files:
            files[shard] = safe_open(folder / f"{shard}.safetensors", framework="np")
        return {name: files[shard].get_tensor(f"{number}/{name}").astype(np.float32) for name in shapes}

    return read


FORMATS = {
    "npy": Format("`.npy` an image", write_npy, open_npy),
    "npy_map": Format("the same, memory-mapped", write_npy, open_npy_map, files="npy"),
    "pt": Format("`.pt` an image", write_pt, open_pt),
    "hdf5": Format("one HDF5 file", write_hdf5, open_hdf5, "h5py"),
    "safetensors": Format("safetensors shards, fp16", write_safetensors, open_safetensors, "safetensors"),
}


@dataclass(frozen=True)
class Row:
    """What a loader needs of a row: its arrays by path, and where the sparse ones are."""

    arrays: dict[str, NDArray[Any]]
    entries: Entries | None
    slot: None = None  # its arrays are where the format put them


class DenseRows:
    """Rows of ``folder`` as a lossless store of ``schema`` would give them. Opened by the process that reads."""

    def __init__(self, kind: str, folder: Path, schema: StoreSchema, numbers: Mapping[RowKey, int]) -> None:
        self.kind, self.folder, self.schema, self.numbers = kind, folder, schema, numbers
        # what collating goes by, as in StoreReader
        self.layout: dict[str, ArraySpec] = {
            a.path: a for t in schema.tensors for a in schema.tensor_arrays(t).values()
        }
        self._places = {t: schema.tensor_arrays(t)[""].path for t in schema.tensors}
        self._read: Callable[[int], Dense] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read": None}

    def read(self, key: RowKey, entries: Entries | None) -> Row:
        """The row of ``key``; sparse tensors are picked out of the dense ones at ``entries``."""
        if self._read is None:
            self._read = FORMATS[self.kind].open(self.folder, dense_shapes(self.schema))
        dense = self._read(self.numbers[key])
        picked = gather(self.schema, dense, entries)
        return Row({path: picked[tensor.need.key] for tensor, path in self._places.items()}, entries)


def dense_shapes(schema: StoreSchema) -> dict[str, tuple[int, ...]]:
    """Shapes of the dense tensors that a method's needs come from."""
    return {t.need.name: (schema.count(t), *t.dims) for t in schema.tensors}


def gather(schema: StoreSchema, dense: Dense, entries: Entries | None) -> Dense:
    """Tensors by ``Need.key``: dense needs whole, the others at the entries of their region."""
    values = {}
    for tensor in schema.tensors:
        value = dense[tensor.need.name]
        if tensor.need.at_entries:
            assert entries is not None
            index = entries.index[entries.select(tensor.need.region)].numpy()
            value = value[index if tensor.per == "anchor" else index // schema.grid.num_anchors]
        values[tensor.need.key] = value
    return values


def _split(values: NDArray[np.float32], shapes: Shapes) -> Dense:
    parts, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        parts[name] = values[start : start + size].reshape(shape)
        start += size
    return parts
