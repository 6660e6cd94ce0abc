"""Promise 1: a run from a lossless store gives the losses and weights of a run with the teacher in memory, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdcli.engine.loading import samples
from kdcli.engine.loading.epoch_order import plan_epoch
from kdcli.engine.loading.loader import Loader
from kdcli.engine.loading.samples import collate
from kdcli.engine.training.step import TrainStep
from kdcli.store.reader import StoreReader
from kdcli.structures import RowKey
from tests.support.selection import matrix
from tests.support.small_runs import cache_options, write
from tests.support.traces import run_setup, trace

STEPS = 20
METHODS = ("ld", "rm", "pfi", "ld,rm,pfi")


@pytest.mark.parametrize("method", matrix(METHODS, "ld,rm,pfi".__eq__))
def test_lossless_store_equals_the_live_teacher(
    method: str, shapes: Path, teacher: Path, lossless_store: Path, tmp_path: Path
) -> None:
    live = trace(run_setup(shapes, method, teacher=str(teacher)), tmp_path, STEPS)
    cached = trace(run_setup(shapes, method, cache=str(lossless_store)), tmp_path, STEPS)
    assert len(live[0]) == STEPS
    distilled = [name for name in live[0][0] if name.split("_")[0] in ("ld", "rm", "pfi")]
    assert all(any(step[name] != 0 for step in live[0]) for name in distilled)
    assert live[0] == cached[0]
    assert live[1].keys() == cached[1].keys()
    for name, value in live[1].items():
        assert torch.equal(value, cached[1][name]), name


def test_sizes_of_a_store_equal_those_of_a_live_teacher(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    """Crops and sizes are rows like any other, among them some whose padding the losses must not read."""
    views = "scale-2,identity,crop-1"
    options = cache_options(shapes, teacher, encoding="lossless", views=views)
    store = write(options, tmp_path / "store")
    live = trace(run_setup(shapes, "ld,rm,pfi", teacher=str(teacher), views=views), tmp_path / "live", STEPS)
    cached = trace(run_setup(shapes, "ld,rm,pfi", cache=str(store)), tmp_path / "cached", STEPS)
    assert run_setup(shapes, "ld,rm,pfi", cache=str(store)).options.views == views
    assert live[0] == cached[0]
    assert all(torch.equal(value, cached[1][name]) for name, value in live[1].items())


@pytest.mark.parametrize("method", METHODS)
def test_the_positives_of_a_store_are_not_assigned_again(
    method: str, shapes: Path, lossless_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_setup(shapes, method, cache=str(lossless_store))
    again = replace(run.source, stored_positives=False)
    items = [(position, view) for position in range(8) for view in ("identity", "hflip")]
    expected = [again.load(item).assigned for item in items]
    assert sum(int((assigned >= 0).any()) for assigned in expected) > 8  # an image may have no object
    assert run.source.stored_positives == (method != "pfi")  # whose rows have no positives
    if run.source.stored_positives:
        monkeypatch.delattr(samples, "assign")
    for item, assigned in zip(items, expected, strict=True):
        assert torch.equal(run.source.load(item).assigned, assigned)


def test_a_row_does_not_depend_on_its_neighbours(shapes: Path, teacher: Path) -> None:
    run = run_setup(shapes, "ld,rm,pfi", teacher=str(teacher))
    items = [i for batch in plan_epoch(run.source, run.positions, run.views, seed=0, epoch=0, batch=4) for i in batch]
    wide = [i for i in items if run.source.geometry(i).canvas.size == (96, 128)][:4]
    samples = [run.source.load(i) for i in wide]
    assert run.teacher is not None
    together = run.teacher.forward(collate(samples, None))
    reversed_ = run.teacher.forward(collate(samples[::-1], None))
    alone = run.teacher.forward(collate(samples[:1], None))
    first = len(alone["box_distribution@main+vlr"])
    assert torch.equal(together["box_distribution@main+vlr"][:first], alone["box_distribution@main+vlr"])
    assert torch.equal(reversed_["box_distribution@main+vlr"][-first:], alone["box_distribution@main+vlr"])
    for key in ("features@all", "cls_logits@all"):
        assert torch.equal(together[key][0], alone[key][0])
        assert torch.equal(reversed_[key][-1], alone[key][0])


def test_default_encodings_stay_close(shapes: Path, teacher: Path, default_store: Path) -> None:
    """At the same student weights: LD and RM terms within 1e-3, PFI within 1e-2, gradient cosine at least 0.998."""
    live = run_setup(shapes, "ld,rm,pfi", teacher=str(teacher))
    cached = run_setup(shapes, "ld,rm,pfi", cache=str(default_store))
    assert live.teacher is not None
    assert cached.teacher is not None
    step = TrainStep(live.student, live.methods, None).train()
    parameters = [p for p in live.student.parameters() if p.requires_grad]
    plan = plan_epoch(live.source, live.positions, live.views, seed=0, epoch=0, batch=4)
    live_batches = Loader(live.source, 0).batches(plan)
    cached_batches = Loader(cached.source, 0).batches(plan)
    seen = 0
    for live_batch, cached_batch in zip(live_batches, cached_batches, strict=True):
        state = {k: v.clone() for k, v in step.state_dict().items()}
        exact = gradients(step(live_batch, live.teacher.forward(live_batch))[1], parameters)
        step.load_state_dict(state)  # batch norm moved on
        close = gradients(step(cached_batch, cached.teacher.forward(cached_batch))[1], parameters)
        for name, (value, gradient) in exact.items():
            tolerance = 1e-2 if name.startswith("pfi") else 1e-3
            assert close[name][0] == pytest.approx(value, rel=tolerance, abs=1e-12), name
            if value != 0:
                cosine = torch.nn.functional.cosine_similarity(gradient, close[name][1], dim=0).item()
                assert cosine >= 0.998, (name, cosine)
                seen += 1
    assert seen > 20


def gradients(
    terms: dict[str, torch.Tensor], parameters: list[torch.nn.Parameter]
) -> dict[str, tuple[float, torch.Tensor]]:
    """Value and flat gradient of each term."""
    found = {}
    for name, term in terms.items():
        parts = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        found[name] = (term.item(), torch.cat([g.flatten() for g in parts if g is not None]))
    return found


def test_direct_and_zarr_readers_agree(default_store: Path) -> None:
    direct, through_zarr = StoreReader(default_store), StoreReader(default_store, direct=False)
    keys = [RowKey(i, v) for i in direct.image_ids[:6] for v in direct.views]
    for key in keys:
        ours, theirs = direct.read(key), through_zarr.read(key)
        assert ours.content == theirs.content
        assert ours.guard == theirs.guard
        assert ours.arrays.keys() == theirs.arrays.keys()
        for path, value in ours.arrays.items():
            assert value.tobytes() == theirs.arrays[path].tobytes(), path
