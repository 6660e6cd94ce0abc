"""The manifest: everything that a store's numbers depend on, and the comparison that refuses a foreign store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from kdcli.data.coco import Dataset
from kdcli.detectors.base import Detector
from kdcli.engine.loading.samples import SampleSource
from kdcli.errors import StoreError
from kdcli.geometry.assign import AssignerSpec
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec
from kdcli.methods.base import Method
from kdcli.store.reader import CacheReader, compare_manifests
from kdcli.store.schema import FORMAT_VERSION
from kdcli.structures import Canvas
from kdcli.tensors import CLS_LOGITS, PROPOSAL_LOGITS, TensorSpec


def teacher_entry(detector: Detector, weights_sha256: str, ap: float | None) -> dict[str, Any]:
    """Who the teacher is, and what it gives."""
    specs = {name: {"per": s.per, "dims": list(s.dims)} for name, s in detector.specs().items()}
    return {"model": detector.spec.to_json(), "weights_sha256": weights_sha256, "ap": ap, "specs": specs}


def make_manifest(
    source: SampleSource, views: Sequence[str], teacher: Mapping[str, Any], run: Mapping[str, Any],
    class_order: Sequence[int], *, left_out: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """All fields of a manifest but the schema. ``run``: precision, micro-batch, threads, device of the teacher."""
    return {
        "format": "kdcli.store",
        "version": FORMAT_VERSION,
        "teacher": dict(teacher),
        "teacher_run": dict(run),
        "dataset": {**source.dataset.fingerprint(), "split": source.dataset.split, "left_out": list(left_out)},
        "class_order": list(class_order),
        "canvas": str(source.canvas),
        "views": list(views),
        "view_seed": source.view_seed,
        "assigner": source.assigner.to_json(),
        "regions": source.region_spec.to_json(),
        "versions": {name: version(name) for name in ("kdcli", "torch", "torchvision", "zarr")},
    }


def specs_of(manifest: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """What the teacher of a store gives, with the classes in the data set's order and number."""
    specs = {n: TensorSpec(s["per"], tuple(s["dims"])) for n, s in manifest["teacher"]["specs"].items()}
    return with_classes(specs, len(manifest["class_order"]))


def with_classes(specs: Mapping[str, TensorSpec], num_classes: int) -> dict[str, TensorSpec]:
    """``specs`` once the class logits are reordered to a data set's classes."""
    counts = {CLS_LOGITS: num_classes, PROPOSAL_LOGITS: num_classes + 1}
    return {n: TensorSpec(s.per, (counts[n],)) if n in counts else s for n, s in specs.items()}


def region_spec(base: RegionSpec, methods: Mapping[str, type[Method]], options: Mapping[str, Any]) -> RegionSpec:
    """The regions that resolved method ``options`` ask for, on top of ``base``."""
    changes: dict[str, Any] = {}
    for name, method in methods.items():
        changes |= {o: options[name][o] for o in method.region_options}
    return RegionSpec(**{**base.to_json(), **changes})


def require_match(
    reader: CacheReader, dataset: Dataset, canvas: Canvas, views: Sequence[str],
    index_space: tuple[Grid, AssignerSpec, RegionSpec] | None,
) -> None:  # fmt: skip
    """Raises StoreError (exit 4) listing every field in which a store differs from the run that wants to read it.

    ``index_space``: what decides which anchor has which index and region; None when no method reads by anchor index.
    """
    ours: dict[str, Any] = {"dataset": dataset.fingerprint(), "canvas": str(canvas)}
    if index_space is not None:
        grid, assigner, regions = index_space
        ours |= {"schema": {"grid": grid.to_json()}, "assigner": assigner.to_json(), "regions": regions.to_json()}
    differences = compare_manifests(ours, reader.manifest)
    missing = [v for v in views if v not in reader.views]
    if missing:
        differences.append(f"views: the store has {', '.join(reader.views)}, not {', '.join(missing)}")
    if differences:
        raise StoreError(
            f"store '{reader.place}' does not belong to this run: {'; '.join(differences)}; use the settings of the "
            "store or write another one with `kdcli cache-teacher`"
        )
