"""A two-stage teacher with other classes than the data set: more of them, or in another order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcli.classes import ClassList
from kdcli.detectors.weights import export, load_detector
from kdcli.engine.caching.plan import plan_store
from kdcli.engine.caching.teacher_ap import measure_teacher
from kdcli.engine.evaluation.evaluate import evaluate
from kdcli.engine.loading.epoch_order import plan_epoch
from kdcli.engine.loading.loader import Loader
from kdcli.engine.loading.samples import SampleSource, collate
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.teacher.forward import TeacherForward
from kdcli.files import atomic_save
from kdcli.tensors import PROPOSAL_BOXES, PROPOSAL_LOGITS, Need
from tests.support.small_runs import CANVAS, CLASSES, cache_options, make_teacher

BOTH = Need(PROPOSAL_BOXES, "proposals"), Need(PROPOSAL_LOGITS, "proposals")
DEFEAT = {"defeat": {"obj_cls_weight": 2.0, "bg_cls_weight": 2.0}}


def reversed_classes(teacher: Path, out: Path) -> Path:
    """The same weights under names in the other order: what it calls circle is an arrow."""
    detector, _ = load_detector(teacher)
    atomic_save(export(detector, ClassList.numbered(reversed(CLASSES)), CANVAS, {}), out)
    return out


def test_detections_are_in_the_data_sets_order(shapes: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "t.pt", detector="faster_rcnn")
    other = reversed_classes(teacher, tmp_path / "r.pt")
    found = []
    for file in (teacher, other):
        plan = plan_store(cache_options(shapes, file, method="defeat", methods=DEFEAT), NullReporter())
        source = SampleSource.for_evaluation(plan.source.dataset, plan.source.canvas, plan.teacher.forward.detector)
        found.append(
            evaluate(
                plan.teacher.forward.detector, plan.source.dataset, plan.source.canvas, device=plan.teacher.device, batch=4,
                loader=Loader(source, 0), forward=plan.teacher.forward.outputs, relabel=plan.teacher.forward.relabel,
            ).results
        )  # fmt: skip
    plain, mirrored = ([r["category_id"] for r in results] for results in found)
    assert plain
    assert mirrored == [len(CLASSES) + 1 - k for k in plain]


def test_a_teacher_of_more_classes_is_measured(shapes: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "t.pt", detector="faster_rcnn")
    plan = plan_store(cache_options(shapes, teacher, method="defeat", methods=DEFEAT), NullReporter())
    larger = replace(plan.teacher.forward, class_order=(5, 2, 0))
    assert larger.relabel is not None
    assert larger.relabel.tolist() == [2, -1, 1, -1, -1, 0, -1, -1]
    assert measure_teacher(plan, NullReporter()) is not None


def test_a_class_that_the_data_set_lacks_is_background(shapes: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "t.pt", detector="faster_rcnn")
    plan = plan_store(cache_options(shapes, teacher, method="defeat", methods=DEFEAT), NullReporter())
    batch = collate([plan.source.load((k, "identity")) for k in (0,)], None)
    whole = plan.teacher.forward.rows(batch.images, batch.targets, batch.entries, BOTH)[0]
    few: TeacherForward = replace(plan.teacher.forward, class_order=(5, 2, 0))
    some = few.rows(batch.images, batch.targets, batch.entries, BOTH, [whole[BOTH[0].key]])[0]
    exact, ours = whole[BOTH[1].key].softmax(dim=-1), some[BOTH[1].key].softmax(dim=-1)
    torch.testing.assert_close(ours[:, :3], exact[:, [5, 2, 0]])
    torch.testing.assert_close(ours[:, 3], exact[:, [1, 3, 4, 6, 7, 8]].sum(dim=-1))


@pytest.mark.parametrize(("batch", "world"), [(9, 4), (5, 2), (8, 8)])
def test_every_process_has_images(shapes: Path, tmp_path: Path, batch: int, world: int) -> None:
    plan = plan_store(cache_options(shapes, make_teacher(tmp_path / "t.pt"), method="rm"), NullReporter())
    place = {"seed": 0, "epoch": 0, "batch": batch, "world": world}
    shares = [plan_epoch(plan.source, plan.positions, ("identity",), rank=r, **place) for r in range(world)]
    for parts in zip(*shares, strict=True):
        sizes = [len(p) for p in parts]
        assert sum(sizes) == batch
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) > 0
    seen = {position for share in shares for part in share for position, _ in part}
    assert seen == set(np.asarray(plan.positions).tolist())
