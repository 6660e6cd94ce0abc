"""Whether a teacher, stored or live, goes with a student and its data."""

from __future__ import annotations

from collections.abc import Sequence

from kdcli.data.coco import Dataset
from kdcli.detectors.base import Detector
from kdcli.engine.teacher.specs import TeacherSide
from kdcli.errors import OptionError, StoreError
from kdcli.geometry.assign import AssignerSpec
from kdcli.geometry.grid import Grid
from kdcli.geometry.regions import RegionSpec
from kdcli.store.reader import StoreReader
from kdcli.structures import Canvas


def require_match(
    reader: StoreReader, dataset: Dataset | None, canvas: Canvas, views: Sequence[str],
    index_space: tuple[Grid, AssignerSpec, RegionSpec] | None,
) -> None:  # fmt: skip
    """Raises StoreError (exit 4) listing every field in which a store differs from the run that wants to read it.

    ``dataset``: None when the loop that reads the store has its own. ``index_space``: what decides which anchor has which
    index and region; None when no method reads by anchor index.
    """
    fingerprint = (reader.manifest.dataset if dataset is None else dataset).fingerprint()
    differences = reader.manifest.run_differences(fingerprint, canvas, index_space)
    missing = [v for v in views if v not in reader.views]
    if missing:
        differences.append(f"views: the store has {', '.join(reader.views)}, not {', '.join(missing)}")
    if differences:
        raise StoreError(
            f"store '{reader.storage}' does not belong to this run: {'; '.join(differences)}; use the settings of the "
            "store or write another one with `kdcli cache-teacher`"
        )


def require_strides(side: TeacherSide, student: Detector) -> None:
    """Feature methods pair cells, so both grids must have the same ones, whatever their anchors. Raises OptionError."""
    theirs = side.reader.schema.grid if side.reader else side.detector.grid if side.detector else student.grid
    if theirs.strides != student.grid.strides:
        raise OptionError(
            f"teacher {side.name} has maps at strides {list(theirs.strides)}, student {student.spec.name} at "
            f"{list(student.grid.strides)}; distillation needs the same strides on both sides"
        )
