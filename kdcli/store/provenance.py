"""Where the numbers of a store come from: the records inside its manifest.

Each is a table of the manifest's JSON with the same fields in the same order. ``from_json`` raises ValueError, naming the
field as ``impossible ...``, before anything is allocated by what it says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kdcli.store.arrays import MAX_DIMS
from kdcli.store.comparison import compare
from kdcli.store.validation import field, is_count, require, table, whole_numbers
from kdcli.tensors import TensorSpec

MAX_CHANNELS = 2**16  # 20 times the most that a backbone gives


@dataclass(frozen=True, kw_only=True)
class TeacherRecord:
    """Who the teacher is, and what it gives."""

    model: Mapping[str, Any]  # how it is built: JSON of a ModelSpec
    weights_sha256: str
    ap: float | None  # on the val split; None without one, and until it is measured
    specs: Mapping[str, TensorSpec]  # with the teacher's own classes

    @property
    def detector(self) -> str:
        """``gfl``."""
        return str(self.model["detector"])

    @property
    def name(self) -> str:
        """``gfl_resnet50``."""
        return f"{self.detector}_{self.model['backbone']}"

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        specs = {name: {"per": str(spec.per), "dims": list(spec.dims)} for name, spec in self.specs.items()}
        return {"model": dict(self.model), "weights_sha256": self.weights_sha256, "ap": self.ap, "specs": specs}

    @staticmethod
    def from_json(data: dict[str, Any]) -> TeacherRecord:
        """Inverse of ``to_json``. Students get layers of as many channels as the specs say, so these have a bound."""
        model = field(data, "model", dict)
        field(model, "detector", str)
        field(model, "backbone", str)
        ap = data.get("ap")
        require(ap is None or (type(ap) in (int, float) and math.isfinite(ap)), "ap")
        specs = {}
        for name, spec in field(data, "specs", dict).items():
            dims = whole_numbers(table(spec, "specs"), "dims")
            require(len(dims) <= MAX_DIMS and all(1 <= n <= MAX_CHANNELS for n in dims), "specs")
            specs[name] = TensorSpec(field(spec, "per", str), dims)
        return TeacherRecord(model=model, weights_sha256=field(data, "weights_sha256", str), ap=ap, specs=specs)


@dataclass(frozen=True, kw_only=True)
class TeacherRun:
    """How the teacher was run: what its numbers depend on besides its weights."""

    precision: str
    micro_batch: int
    device: str  # cpu or cuda
    threads: int | None  # on a CPU
    compile: bool | None  # None: not compiled
    records_compile: bool = True  # a store from before this option has no such field

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "precision": self.precision,
            "micro_batch": self.micro_batch,
            "device": self.device,
            "threads": self.threads,
            **({"compile": self.compile} if self.records_compile else {}),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> TeacherRun:
        """Inverse of ``to_json``."""
        threads, compiled = data.get("threads"), data.get("compile")
        require(threads is None or is_count(threads), "threads")
        require(compiled is None or isinstance(compiled, bool), "compile")
        return TeacherRun(
            precision=field(data, "precision", str),
            micro_batch=field(data, "micro_batch", int),
            device=field(data, "device", str),
            threads=threads,
            compile=compiled,
            records_compile="compile" in data,
        )


@dataclass(frozen=True, kw_only=True)
class AddedOn:
    """Where a tensor was computed that ``cache add`` added on another device than the store's."""

    device: str
    threads: int | None  # on a CPU

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {"device": self.device, **({} if self.threads is None else {"threads": self.threads})}

    @staticmethod
    def from_json(data: dict[str, Any]) -> AddedOn:
        """Inverse of ``to_json``."""
        threads = data.get("threads")
        require(threads is None or is_count(threads), "added_on")
        return AddedOn(device=field(data, "device", str), threads=threads)


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """The images and boxes that the rows are of."""

    annotations_sha256: str
    categories: tuple[tuple[int, str], ...]  # id and name, in the order of the classes
    num_images: int
    split: str
    left_out: tuple[int, ...]  # image ids without rows, sorted
    exif: Literal["ignored"] | None = None  # None: orientations were applied where the annotated size allows
    boxes: Literal["clipped"] | None = None  # None: an image with a box beyond its border was refused or left out

    @staticmethod
    def of(fingerprint: Mapping[str, Any], split: str, left_out: tuple[int, ...]) -> DatasetRecord:
        """Of what ``Dataset.fingerprint`` says."""
        return DatasetRecord.from_json({**fingerprint, "split": split, "left_out": list(left_out)})

    def fingerprint(self) -> dict[str, Any]:
        """What ``Dataset.fingerprint`` said when the store was written."""
        return {
            "annotations_sha256": self.annotations_sha256,
            "categories": [list(category) for category in self.categories],
            "num_images": self.num_images,
            **self.reading(),
        }

    def reading(self) -> dict[str, Any]:
        """In what the data set was not read as usual; empty for most."""
        return {name: value for name, value in (("exif", self.exif), ("boxes", self.boxes)) if value is not None}

    def differences(self, ours: DatasetRecord) -> list[str]:
        """Fields in which ``ours`` is another data set, as ``dataset.field: store X, here Y``."""
        return compare({"dataset": self.to_json()}, {"dataset": ours.to_json()})

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {**self.fingerprint(), "split": self.split, "left_out": list(self.left_out)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> DatasetRecord:
        """Inverse of ``to_json``."""
        categories = []
        for category in field(data, "categories", list):
            require(isinstance(category, list) and [type(v) for v in category] == [int, str], "categories")
            categories.append((category[0], category[1]))
        for values in zip(*categories, strict=True):  # ids, names: classes are found by either
            require(len(set(values)) == len(values), "categories")
        exif, boxes = data.get("exif"), data.get("boxes")
        require(exif in (None, "ignored"), "exif")
        require(boxes in (None, "clipped"), "boxes")
        return DatasetRecord(
            annotations_sha256=field(data, "annotations_sha256", str),
            categories=tuple(categories),
            num_images=field(data, "num_images", int),
            split=field(data, "split", str),
            left_out=whole_numbers(data, "left_out"),
            exif=exif,
            boxes=boxes,
        )


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Folders at the time of writing: for messages and as defaults, not what the store is."""

    data: str
    teacher: str

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {"data": self.data, "teacher": self.teacher}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Origin:
        """Inverse of ``to_json``."""
        return Origin(data=field(data, "data", str), teacher=field(data, "teacher", str))
