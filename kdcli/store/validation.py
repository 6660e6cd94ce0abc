"""What a manifest and a journal entry have to look like before anything goes by them: anyone can seal a hostile one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from kdcli.errors import OptionError
from kdcli.geometry.assign import AssignerSpec
from kdcli.geometry.regions import RegionSpec
from kdcli.store.arrays import MAX_DIMS
from kdcli.store.encodings import Box16, ChannelAffine
from kdcli.store.schema import StoreSchema
from kdcli.tensors import Need, Per, Region, per_level

T = TypeVar("T")
VIEW = re.compile(r"[a-z]{1,32}(-[0-9]{1,6})?")
ARRAY_PATH = re.compile(r"[a-z][a-z0-9_]*([/@+][a-z0-9_]+)*")
CHECKSUM = re.compile(r"[0-9a-f]{8}")
DENSE_PER = (Per.CELL, Per.ANCHOR, *(per_level(k) for k in range(5)))
MAX_CHANNELS = 2**16  # 20 times the most that a backbone gives
ERROR_KINDS = ("encoding", "precision")


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raises ValueError for fields that no kdcli writes, as far as a reader or a run goes by them."""
    views = _field(manifest, "views", list)
    _require(all(isinstance(v, str) and VIEW.fullmatch(v) for v in views) and len(set(views)) == len(views), "views")
    _require(bool(views), "views")
    _field(manifest, "schema", dict)
    _require(isinstance(manifest.get("versions", {}), dict), "versions")
    _check_numbers(manifest.get("errors", {}))
    if manifest.get("teacher") is not None:  # a store of the engine: only tests name none
        _check_teacher(manifest["teacher"])
        for spec, name in ((AssignerSpec, "assigner"), (RegionSpec, "regions")):
            try:
                spec.from_json(_field(manifest, name, dict))
            except OptionError as error:
                raise ValueError(f"impossible {name} ({error})") from error
        _field(manifest, "teacher_run", dict)
        for values in (
            _field(manifest, "class_order", list),
            _field(_field(manifest, "dataset", dict), "left_out", list),
        ):
            _require(all(type(v) is int for v in values), "class_order or left_out")


def _check_teacher(teacher: Mapping[str, Any]) -> None:
    """Students get layers of as many channels as ``specs`` say."""
    model = _field(teacher, "model", dict)
    _field(model, "detector", str)
    _field(model, "backbone", str)
    _field(teacher, "weights_sha256", str)
    ap = teacher.get("ap")
    _require(ap is None or (type(ap) in (int, float) and math.isfinite(ap)), "ap")
    for spec in _field(teacher, "specs", dict).values():
        dims = _field(spec, "dims", list)
        _field(spec, "per", str)
        _require(len(dims) <= MAX_DIMS and all(_whole(n) and 1 <= n <= MAX_CHANNELS for n in dims), "specs")


def _field(document: Any, name: str, kind: type[T]) -> T:
    value = document.get(name) if isinstance(document, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"impossible or no {name}")
    return value


def check_entry(entry: Mapping[str, Any], name: str) -> None:
    """Raises ValueError, KeyError or TypeError when ``entry`` cannot be what the journal file ``name`` holds."""
    start, stop = entry["rows"]
    _require(_whole(entry["shard"]) and name == f"{entry['shard']:06d}.json", "shard")
    _require(_whole(start) and _whole(stop) and start < stop, "rows")
    for path, file in entry["files"].items():
        _require(len(path) <= 255 and ARRAY_PATH.fullmatch(path) is not None, "files")
        _require(set(file) == {"bytes", "crc32c"} and _whole(file["bytes"]), "files")
        _require(CHECKSUM.fullmatch(file["crc32c"]) is not None, "files")
    _require(isinstance(entry["measured"], dict), "measured")
    _check_numbers({kind: entry["measured"][kind] for kind in ERROR_KINDS if kind in entry["measured"]})


def check_readable(schema: StoreSchema) -> None:
    """Raises ValueError for a finished store's schema by which its arrays could be read, but not decoded."""
    stored = {t.need for t in schema.tensors}
    for need in schema.derived_from_dense:
        _require(Need(need.name, Region.ALL) in stored, f"{need.key}, which no dense tensor serves")
    for tensor in schema.tensors:
        need = tensor.need
        kinds: dict[str, tuple[str, ...]] = {
            Region.ALL: DENSE_PER,
            Region.GT: (Per.BOX,),
            Region.PROPOSALS: (Per.PROPOSAL,),
        }
        kind = kinds.get(need.region, (Per.CELL, Per.ANCHOR))
        _require(tensor.per in kind, f"{need.key} per {tensor.per}")
        # these have a scale for each level, and sparse rows have no levels
        by_level = isinstance(tensor.encoding, ChannelAffine | Box16)
        _require(need.dense or not by_level, f"{need.key} as {tensor.encoding.to_json()['name']}")


def _check_numbers(found: Any) -> None:
    """Kind, then tensor, then finite numbers of at least 0; what was measured has a count."""
    for tensors in _table(found).values():
        for numbers in _table(tensors).values():
            for number in _table(numbers).values():
                _require(type(number) in (int, float) and math.isfinite(number) and number >= 0, "errors")
            _require(numbers.get("count", 1) > 0, "errors")


def _table(value: Any) -> dict[str, Any]:
    _require(isinstance(value, dict), "errors")
    table: dict[str, Any] = value
    return table


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _require(right: bool, what: str) -> None:
    if not right:
        raise ValueError(f"impossible {what}")
