"""The manifest: everything that a store's numbers depend on, kept in the attributes of its root group.

This module and ``provenance.py`` alone know the fields of its JSON. What is read is written back as it was: a document
with a field that ``Manifest`` would not write is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kdcli.errors import KDError, MissingPathError, OptionError, StoreError
from kdcli.geometry.assign import AssignerSpec
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec
from kdcli.store.checksummed_json import add_checksum, digest, parse, verify_checksum
from kdcli.store.comparison import compare
from kdcli.store.encoding_error import Measured
from kdcli.store.provenance import AddedOn, DatasetRecord, Origin, TeacherRecord, TeacherRun
from kdcli.store.row_identity import LENGTH
from kdcli.store.schema import StoreSchema
from kdcli.store.storage.base import Where
from kdcli.store.storage.resolve import open_storage
from kdcli.store.validation import field, require, table, whole_numbers
from kdcli.structures import Canvas

ATTRIBUTE = "kdcli"  # of the root group
FORMAT = "kdcli.store"
METHOD = re.compile(r":?[A-Za-z_][A-Za-z0-9_]*")  # no path: nothing in a store leads to code that runs
VIEW = re.compile(r"[a-z]{1,32}(-[0-9]{1,6})?")
BOUND = ("format", "version", "teacher_run", "dataset", "class_order", "canvas", "views", "view_seed", "assigner")
ROWS = ("rows", "shard_rows", "max_boxes")  # of a schema: how many there are, not what they are


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store is and how it was made. The canvas of its rows is the schema's."""

    teacher: TeacherRecord
    teacher_run: TeacherRun
    dataset: DatasetRecord
    class_order: tuple[int, ...]  # for each class of the data set, the teacher's class of this name
    views: tuple[str, ...]
    view_seed: int
    assigner: Mapping[str, Any]  # JSON of an AssignerSpec; an older store may lack fields
    regions: Mapping[str, Any]  # JSON of a RegionSpec, likewise
    versions: Mapping[str, str]  # of the packages that wrote it
    methods: tuple[str, ...]  # a user's is the name of its class behind a colon, ``:Mine``
    method_options: Mapping[str, Mapping[str, Any]]  # by name of the method
    method_needs: Mapping[str, tuple[str, ...]]  # keys of what each reads, likewise; empty in format version 1
    origin: Origin
    schema: StoreSchema
    added_on: Mapping[str, AddedOn]  # tensors, by key, that another device computed than the rest
    errors: Measured | None = None  # None until the last shard is written

    @cached_property
    def assigner_spec(self) -> AssignerSpec:
        """What decides positives."""
        return AssignerSpec.from_json(self.assigner)

    @cached_property
    def region_spec(self) -> RegionSpec:
        """What decides the sparse regions."""
        return RegionSpec.from_json(self.regions)

    def to_json(self) -> dict[str, Any]:
        """JSON form, without a checksum."""
        return {
            "format": FORMAT,
            "version": self.schema.version,
            "teacher": self.teacher.to_json(),
            "teacher_run": self.teacher_run.to_json(),
            "dataset": self.dataset.to_json(),
            "class_order": list(self.class_order),
            "canvas": str(self.schema.canvas),
            "views": list(self.views),
            "view_seed": self.view_seed,
            "assigner": dict(self.assigner),
            "regions": dict(self.regions),
            "versions": dict(self.versions),
            "methods": ",".join(self.methods),
            "method_options": {name: dict(options) for name, options in self.method_options.items()},
            **self._needs_json(),
            "origin": self.origin.to_json(),
            **({"added_on": {key: run.to_json() for key, run in self.added_on.items()}} if self.added_on else {}),
            "schema": self.schema.to_json(),
            **({} if self.errors is None else {"errors": self.errors.to_json()}),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Manifest:
        """Inverse of ``to_json``. Raises ValueError for fields that no kdcli writes, StoreError for such a schema."""
        versions, options = field(data, "versions", dict), field(data, "method_options", dict)
        require(all(isinstance(v, str) for v in versions.values()), "versions")
        methods = field(data, "methods", str)
        manifest = Manifest(
            teacher=TeacherRecord.from_json(field(data, "teacher", dict)),
            teacher_run=TeacherRun.from_json(field(data, "teacher_run", dict)),
            dataset=DatasetRecord.from_json(field(data, "dataset", dict)),
            class_order=whole_numbers(data, "class_order"),
            views=_views(data),
            view_seed=field(data, "view_seed", int),
            assigner=field(data, "assigner", dict),
            regions=field(data, "regions", dict),
            versions=versions,
            methods=tuple(methods.split(",")) if methods else (),
            method_options={name: table(values, "method_options") for name, values in options.items()},
            method_needs=_method_needs(data, options),
            origin=Origin.from_json(field(data, "origin", dict)),
            schema=StoreSchema.from_json(field(data, "schema", dict), field(data, "version", int)),
            added_on=_added_on(data),
            errors=Measured.from_json(data["errors"]) if "errors" in data else None,
        )
        for name, spec in (("assigner", AssignerSpec), ("regions", RegionSpec)):
            try:
                spec.from_json(data[name])
            except OptionError as error:
                raise ValueError(f"impossible {name} ({error})") from error
        written = manifest.to_json()
        if written != data:
            unknown = [name for name in data if name not in written] or [
                d.split(":")[0] for d in compare(data, written)
            ]
            raise ValueError(f"impossible {', '.join(unknown)[:200]}")
        return manifest

    def _needs_json(self) -> dict[str, Any]:
        if self.schema.version == 1:
            return {}
        return {"method_needs": {name: list(keys) for name, keys in self.method_needs.items()}}

    def describe(self) -> dict[str, Any]:
        """JSON of all but the schema and the errors, which ``cache info`` tells tensor by tensor."""
        return {name: value for name, value in self.to_json().items() if name not in ("schema", "errors")}

    def identity(self) -> dict[str, Any]:
        """JSON of what two runs that write one store have to agree on. The AP is measured by the first of them alone."""
        teacher = {name: value for name, value in self.teacher.to_json().items() if name != "ap"}
        return {
            "teacher": teacher,
            "teacher_run": {**self.teacher_run.to_json(), "compile": self.teacher_run.compile},
            "dataset": self.dataset.to_json(),
            "class_order": list(self.class_order),
            "canvas": str(self.schema.canvas),
            "views": list(self.views),
            "view_seed": self.view_seed,
            "assigner": self.assigner_spec.to_json(),
            "regions": self.region_spec.to_json(),
            "schema": _readable(self.schema),
        }

    @cached_property
    def binding(self) -> str:
        """sha256 of what never changes in a store, whatever is added to it or dropped: its journal belongs to it alone."""
        whole = self.to_json()
        fixed = {name: whole[name] for name in BOUND}
        fixed["teacher"] = {name: value for name, value in whole["teacher"].items() if name != "ap"}
        fixed["schema"] = {name: whole["schema"][name] for name in ("grid", "rows", "shard_rows")}
        return digest(fixed)

    def differences(self, ours: Manifest, *, ignoring: Collection[str] = ()) -> list[str]:
        """Fields of ``identity`` in which ``ours`` is not this store's, as ``field: store X, here Y``."""
        return _compare_identities(self.identity(), ours.identity(), ignoring)

    def content_differences(self, ours: Manifest) -> list[str]:
        """All fields that differ, but for the errors, which come last."""
        stored, here = ({**m.describe(), "schema": _readable(m.schema)} for m in (self, ours))
        return compare(stored, here)

    def merge_differences(self, ours: Manifest) -> list[str]:
        """What keeps two stores from being merged: they may have other images, other views and other numbers of rows."""
        return _compare_identities(self._mergeable(), ours._mergeable())

    def _mergeable(self) -> dict[str, Any]:
        identity = self.identity()
        del identity["views"]
        return {
            **identity,
            "teacher": self.teacher.to_json(),
            "dataset": {"categories": self.dataset.fingerprint()["categories"], **self.dataset.reading()},
            "added_on": {key: run.to_json() for key, run in self.added_on.items()},
            "schema": {name: value for name, value in identity["schema"].items() if name not in ROWS},
        }

    def region_differences(self, ours: Manifest) -> list[str]:
        """In what the rules of the sparse regions differ."""
        return compare({"regions": self.region_spec.to_json()}, {"regions": ours.region_spec.to_json()})

    def run_differences(
        self,
        fingerprint: Mapping[str, Any],
        canvas: Canvas | None = None,
        index_space: tuple[Grid, AssignerSpec, RegionSpec] | None = None,
    ) -> list[str]:
        """In what a run that reads this store differs from it. ``fingerprint``: of its data set; None: not compared.

        ``index_space``: what decides which anchor has which index and region.
        """
        stored: dict[str, Any] = {"dataset": self.dataset.fingerprint()}
        here: dict[str, Any] = {"dataset": fingerprint}
        if canvas is not None:
            stored["canvas"], here["canvas"] = str(self.schema.canvas), str(canvas)
        if index_space is not None:
            mine = (self.schema.grid, self.assigner_spec, self.region_spec)
            for fields, (grid, assigner, regions) in ((stored, mine), (here, index_space)):
                fields["schema"] = {"grid": grid.to_json()}
                fields |= {"assigner": assigner.to_json(), "regions": regions.to_json()}
        return compare(stored, here)


def name_of(method: str) -> str:
    """What one of ``Manifest.methods`` is called: a class of a file by its name in lower case."""
    _, colon, name = method.rpartition(":")
    return name.lower() if colon else method


def read_manifest(where: Where) -> Manifest:
    """The manifest of a store. Raises MissingPathError or StoreError."""
    path = open_storage(where)
    if not path.exists():
        raise MissingPathError(f"store '{path}' does not exist; write one with `kdcli cache-teacher --out {path}`")
    try:
        document = parse(path.read("zarr.json"))
        found = document["attributes"][ATTRIBUTE]
        plain = {"attributes": {ATTRIBUTE: found}, "zarr_format": 3, "node_type": "group"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, KDError):
            raise
        raise StoreError(f"'{path}' is not a kdcli store: its zarr.json has no '{ATTRIBUTE}' manifest") from error
    kind = found.get("format") if isinstance(found, dict) else None
    if kind != FORMAT:
        raise StoreError(f"'{path}' is not a kdcli store: format is {repr(kind)[:80]}")
    version = found.get("version")
    if type(version) is not int or version not in LENGTH:
        raise StoreError(
            f"store '{path}' is of format version {repr(version)[:80]}, this kdcli reads {', '.join(map(str, LENGTH))}; "
            "write it again, or use the kdcli that wrote it"
        )
    if document != plain:
        raise StoreError(f"the zarr.json of store '{path}' is not what was written; write the store again")
    try:
        return Manifest.from_json(verify_checksum(found, f"the manifest of store '{path}'"))
    except ValueError as error:
        if isinstance(error, KDError):
            raise
        raise StoreError(f"store '{path}': its manifest has {error}; write the store again") from error


def write_manifest(store: Where, manifest: Manifest) -> None:
    """Replace the manifest of a store, in one step."""
    storage = open_storage(store)
    document = json.loads(storage.read("zarr.json"))
    document["attributes"][ATTRIBUTE] = add_checksum(manifest.to_json())
    storage.write("zarr.json", json.dumps(document, indent=2).encode())


def _compare_identities(stored: dict[str, Any], here: dict[str, Any], ignoring: Collection[str] = ()) -> list[str]:
    models = [side["teacher"]["model"] for side in (stored, here)]
    # an older store lacks options of models that came later; whether it is the same teacher, the weights say
    shared = models[0].keys() & models[1].keys()
    for side, model in zip((stored, here), models, strict=True):
        side["teacher"]["model"] = {name: value for name, value in model.items() if name in shared}
        for name in ignoring:
            del side[name]
    return compare(stored, here)


def _views(data: dict[str, Any]) -> tuple[str, ...]:
    views = field(data, "views", list)
    require(all(isinstance(v, str) and VIEW.fullmatch(v) for v in views), "views")
    require(0 < len(views) == len(set(views)), "views")
    return tuple(views)


def _method_needs(data: dict[str, Any], options: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    if data["version"] == 1:
        return {}
    texts = [text for text in field(data, "methods", str).split(",") if text]
    require(all(METHOD.fullmatch(text) for text in texts), "methods")
    require({name_of(text) for text in texts} == options.keys() and len(texts) == len(options), "methods")
    found = field(data, "method_needs", dict)
    require(found.keys() == options.keys(), "method_needs")
    for keys in found.values():
        require(
            isinstance(keys, list) and all(isinstance(key, str) and key.count("@") == 1 for key in keys), "method_needs"
        )
    return {name: tuple(keys) for name, keys in found.items()}


def _added_on(data: dict[str, Any]) -> dict[str, AddedOn]:
    if "added_on" not in data:
        return {}
    found = field(data, "added_on", dict)
    require(bool(found), "added_on")
    return {key: AddedOn.from_json(table(run, "added_on")) for key, run in found.items()}


def _readable(schema: StoreSchema) -> dict[str, Any]:
    """A schema's JSON with its tensors in one line, so that a difference can be read."""
    lines = []
    for tensor in schema.tensors:
        name, *parameters = tensor.encoding.to_json().values()
        lines.append(" ".join([tensor.need.key, name, *map(str, parameters)]))
    return {**schema.to_json(), "tensors": ", ".join(sorted(lines))}
