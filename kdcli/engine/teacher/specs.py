"""What a teacher is and gives, stored or live, before the student is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdcli.detectors.base import Detector
from kdcli.detectors.weights import CheckpointMeta
from kdcli.geometry.regions import RegionSpec
from kdcli.methods.base import Method
from kdcli.store.manifest import Manifest
from kdcli.store.provenance import TeacherRecord
from kdcli.store.reader import StoreReader
from kdcli.structures import Canvas
from kdcli.tensors import CLS_LOGITS, PROPOSAL_LOGITS, TensorSpec


def teacher_record(detector: Detector, weights_sha256: str) -> TeacherRecord:
    """A teacher for the manifest, whose AP is not measured yet."""
    return TeacherRecord(model=detector.spec.to_json(), weights_sha256=weights_sha256, ap=None, specs=detector.specs())


def specs_of(manifest: Manifest) -> dict[str, TensorSpec]:
    """What the teacher of a store gives, with the classes in the data set's order and number."""
    return with_classes(manifest.teacher.specs, len(manifest.class_order))


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


@dataclass(frozen=True, kw_only=True)
class TeacherSide:
    """What the teacher contributes before the student is known. Either ``reader`` or ``detector`` is set."""

    name: str
    specs: Mapping[str, TensorSpec]
    canvas: Canvas
    views: tuple[str, ...] | None  # of a store; a live teacher takes any
    ap: float | None
    sha256: str
    reader: StoreReader | None = None
    detector: Detector | None = None
    meta: CheckpointMeta | None = None
