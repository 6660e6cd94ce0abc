"""A loss of the surface is the loss of ``kdcli distill`` on the same batch, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kdcli
from kdcli.api.losses import Losses
from kdcli.engine.loading.epoch_order import image_draws, plan_epoch
from kdcli.engine.loading.loader import Loader
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training.setup import RunSetup, prepare
from kdcli.engine.training.step import TrainStep
from kdcli.structures import MAIN, Batch
from tests.support.small_runs import cache_options, run_request, write

# the sparse, the dense, those that read boxes, those that read the assignment, those that draw at random
METHODS = ("ld", "rm", "pfi", "pkd", "cwd", "fgd", "bckd", "drkd", "defeat", "ld,rm,pfi")
OPTIONS: dict[str, dict[str, Any]] = {"defeat": {"obj_cls_weight": 0.0, "bg_cls_weight": 0.0}}
QUIET = pytest.mark.filterwarnings("ignore:ld. kd_weight:UserWarning")


@pytest.fixture(scope="module")
def stores(shapes: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default encodings of what these methods read."""
    options = cache_options(shapes, teacher, method="ld,rm,pfi,pkd,cwd,fgd,bckd,drkd,defeat", methods=OPTIONS)
    return write(options, tmp_path_factory.mktemp("surface") / "store")


def run_setup(shapes: Path, store: Path, method: str) -> RunSetup:
    """A run of ``kdcli distill``."""
    options = {name: OPTIONS[name] for name in method.split(",") if name in OPTIONS}
    fields = run_request("distill", shapes, method=method, cache=str(store), methods=options)
    return prepare(fields.options(), frozenset(fields.fields), NullReporter())


def planned(run: RunSetup) -> list[Any]:
    """The batches of the run's first epoch."""
    return plan_epoch(run.source, run.positions, run.views, seed=0, epoch=0, batch=4)


def batches_of(run: RunSetup) -> list[Batch]:
    """What the trainer of ``run`` hands to its step in the first epoch."""
    return [
        replace(batch, targets=replace(batch.targets, draws=image_draws(batch.keys, 0, 0)))
        for batch in Loader(run.source, 0).batches(planned(run))
    ]


def criterion_of(run: RunSetup, store: kdcli.Store, method: str, student: Any) -> Losses:
    """The surface's losses, with the adapters of the run."""
    made = kdcli.losses(method, store=store, student=student)
    made.methods.load_state_dict(TrainStep(run.student, run.methods, None).methods.state_dict())
    return made


@QUIET
@pytest.mark.parametrize("method", METHODS)
def test_terms_equal_those_of_distill(method: str, shapes: Path, stores: Path) -> None:
    run = run_setup(shapes, stores, method)
    assert run.teacher is not None
    step = TrainStep(run.student, run.methods, None).eval()
    options = {name: OPTIONS[name] for name in method.split(",") if name in OPTIONS}
    store = kdcli.open_store(stores, method, options, data=shapes)
    criterion = criterion_of(run, store, method, run.student)
    assert store.batches(4) == [[(run.source.dataset.image_id(p), v) for p, v in items] for items in planned(run)]
    seen: set[str] = set()
    for batch, keys in zip(batches_of(run)[:4], store.batches(4), strict=False):
        _, expected = step(batch, run.teacher.forward(batch))
        ours = store.read(keys)
        images = torch.stack([store.image(*key) for key in keys])
        assert torch.equal(images, batch.images)
        assert torch.equal(ours.batch.targets.assigned, batch.targets.assigned)
        outputs = run.student(images.float().div_(255))
        found = criterion(criterion.read(outputs, ours), ours)
        assert found.keys() == expected.keys()
        for name, term in expected.items():
            assert torch.equal(found[name], term), name
            parameters = [p for p in run.student.parameters() if p.requires_grad]
            gradients = (
                torch.autograd.grad(t, parameters, retain_graph=True, allow_unused=True) for t in (found[name], term)
            )
            for mine, theirs in zip(*gradients, strict=True):
                assert (mine is None and theirs is None) or (mine is not None and torch.equal(mine, theirs)), name
            seen |= {name} if term != 0 else set()
    assert {name.split("_")[0] for name in seen} == set(method.split(","))


@pytest.mark.parametrize("method", ["pkd", "cwd", "fgd"])
def test_another_network_needs_its_channels_alone(method: str, shapes: Path, stores: Path) -> None:
    run = run_setup(shapes, stores, method)
    assert run.teacher is not None
    step = TrainStep(run.student, run.methods, None).eval()
    store = kdcli.open_store(stores, method, data=shapes)
    criterion = criterion_of(run, store, method, {"features": 32})
    batch, keys = batches_of(run)[0], store.batches(4)[0]
    _, expected = step(batch, run.teacher.forward(batch))
    ours = store.read(keys)
    flat = run.student(batch.images.float().div_(255))["features"]
    shapes_of = store.grid.level_shapes(ours.canvas)
    cut = torch.split(flat, [h * w for h, w in shapes_of], dim=1)
    maps = [part.mT.unflatten(2, shape) for part, shape in zip(cut, shapes_of, strict=True)]
    found = criterion({"features@all": ours.flatten(maps)}, ours)
    assert all(torch.equal(found[name], term) for name, term in expected.items())
    assert found.keys() == expected.keys()


def test_a_doubtful_option_is_a_warning(stores: Path) -> None:
    store = kdcli.open_store(stores, "ld")
    with pytest.warns(UserWarning, match="^ld: kd_weight 10 was published for 80 classes"):
        kdcli.losses("ld", store=store, student={"cls_logits": 8, "box_distribution": (4, 17)})


@QUIET
def test_another_network_on_the_same_anchors(shapes: Path, stores: Path) -> None:
    store = kdcli.open_store(stores, "ld", data=shapes)
    student = {"cls_logits": 8, "box_distribution": (4, 17)}
    criterion = kdcli.losses("ld", store=store, student=student)
    batch = store.read(store.batches(4)[0])
    anchors = store.grid.num_total(batch.canvas)
    outputs = {
        "cls_logits": torch.randn(4, anchors, 8, requires_grad=True),
        "box_distribution": torch.randn(4, anchors, 4, 17, requires_grad=True),
    }
    terms = criterion(criterion.read(outputs, batch), batch)
    assert set(terms) == {"ld_main", "ld_vlr", "ld_kd"}
    sum(terms.values(), torch.zeros(())).backward()
    assert outputs["box_distribution"].grad is not None
    assert batch.entries is not None
    read = outputs["box_distribution"].grad.abs().sum(dim=(2, 3)) > 0
    assert int(read.sum()) == len(batch.entries.index)
    assert read[batch.entries.image, batch.entries.index].all()
    same = {n: batch.tensors[n] for n in ("box_distribution@main+vlr", "cls_logits@main")}
    assert all(float(term) == pytest.approx(0, abs=1e-5) for term in criterion(same, batch).values())


def test_adapters_are_parameters_and_the_student_is_not(shapes: Path, stores: Path) -> None:
    run = run_setup(shapes, stores, "pkd")
    store = kdcli.open_store(stores, "pkd")
    criterion = kdcli.losses("pkd", store=store, student=run.student)
    assert [p.shape for p in criterion.parameters()] == [(64, 32)]


@QUIET
@pytest.mark.parametrize("method", ["ld", "pfi", "pkd", "cwd"])
def test_methods_that_read_no_targets_need_none(method: str, stores: Path, shapes: Path) -> None:
    plain, with_boxes = kdcli.open_store(stores), kdcli.open_store(stores, data=shapes)
    keys = plain.batches(4)[0]
    criterion = kdcli.losses(
        method, store=plain, student={"features": 64, "cls_logits": 8, "box_distribution": (4, 17)}
    )
    assert not criterion.reads_targets
    outputs = {"features": torch.ones(4, 257, 64), "cls_logits": torch.ones(4, 257, 8)}
    outputs["box_distribution"] = torch.ones(4, 257, 4, 17)
    batches = [store.read(keys) for store in (plain, with_boxes)]
    terms = [criterion(criterion.read(outputs, batch), batch) for batch in batches]
    assert all(torch.equal(value, terms[1][name]) and value != 0 for name, value in terms[0].items())


def test_boxes_are_read_or_refused(stores: Path, shapes: Path) -> None:
    plain, with_boxes = kdcli.open_store(stores), kdcli.open_store(stores, data=shapes)
    keys = plain.batches(4)[0]
    criterion = kdcli.losses("fgd", store=plain, student={"features": 64})
    with pytest.raises(kdcli.OptionError, match=r"losses of fgd read the ground truth: .*give targets= "):
        criterion({"features@all": torch.ones(4, 257, 64)}, plain.read(keys))
    assert criterion({"features@all": torch.ones(4, 257, 64)}, with_boxes.read(keys))


@QUIET
@pytest.mark.parametrize(("methods", "student", "message"), [
    ("pkdd", {"features": 8}, "did you mean 'pkd'"),
    ("pkd", {"feature": 8}, "unknown tensor 'feature'; did you mean 'features'"),
    ("pkd", {"cls_logits": 8}, "needs features, which the student network does not give"),
    ("ld", {"cls_logits": 9, "box_distribution": (4, 17)}, r"student network has \[9\], teacher .* has \[8\]"),
])  # fmt: skip
def test_what_cannot_work_is_refused(methods: str, student: dict[str, Any], message: str, stores: Path) -> None:
    with pytest.raises(kdcli.OptionError, match=message) as caught:
        kdcli.losses(methods, store=kdcli.open_store(stores), student=student)
    assert "\n" not in str(caught.value)


@QUIET
def test_options_of_methods(stores: Path) -> None:
    store = kdcli.open_store(stores, "pkd", {"pkd": {"weight": 3.0}})
    assert kdcli.losses("pkd", store=store, student={"features": 64}).methods["pkd"].weight == 3.0
    other = kdcli.losses("pkd", store=store, student={"features": 64}, options={"pkd": {"weight": 5.0}})
    assert other.methods["pkd"].weight == 5.0
    with pytest.raises(kdcli.OptionError, match=r"unknown option 'pkd.weigth'; did you mean"):
        kdcli.losses("pkd", store=store, student={"features": 64}, options={"pkd": {"weigth": 5.0}})
    with pytest.raises(kdcli.OptionError, match="options of 'cwd' are not used"):
        kdcli.losses("pkd", store=store, student={"features": 64}, options={"cwd": {"weight": 5.0}})
    with pytest.raises(kdcli.OptionError, match=r"which do not read box_distribution@main\+vlr, cls_logits@main;"):
        kdcli.losses("ld", store=store, student={"cls_logits": 8, "box_distribution": (4, 17)}, options={})
    fcos = kdcli.losses("fgd", store=kdcli.open_store(stores), student={"features": 64}, detector="fcos")
    assert fcos.methods["fgd"].temperature == 0.8


def test_wrong_tensors_are_refused(stores: Path) -> None:
    store = kdcli.open_store(stores, "pkd")
    criterion = kdcli.losses("pkd", store=store, student={"features": 64})
    batch = store.read(store.batches(4)[0])
    for value, message in (
        ({"features": torch.ones(4, 257, 64)}, "'features@all' is missing; did you mean 'features'"),
        ({"features@all": torch.ones(4, 257, 32)}, r"is \[4, 257, 32\], this batch needs \[4, 257, 64\]"),
        ({"features@all": torch.ones(3, 257, 64)}, r"is \[3, 257, 64\], this batch needs \[4, 257, 64\]"),
    ):
        with pytest.raises(kdcli.OptionError, match=message):
            criterion(value, batch)
    rows, columns = store.grid.level_shapes(batch.canvas)[0]
    with pytest.raises(
        kdcli.OptionError, match=rf"the maps are 4x8x8 \(batch, .*4x{rows}x{columns}, .* at strides 8, 16"
    ):
        batch.flatten([torch.ones(4, 64, 8, 8)])


@QUIET
def test_a_student_of_other_anchors_is_refused(shapes: Path, stores: Path) -> None:
    fields = run_request(
        "train", shapes, model={"name": "fcos_shufflenet_v2_x0_5", "fpn_channels": 32, "box": "distribution"}
    )
    student = prepare(fields.options(), frozenset(fields.fields), NullReporter()).student
    store = kdcli.open_store(stores)
    with pytest.raises(kdcli.StoreError, match=r"does not belong to this run: schema.grid.offset: store 0"):
        kdcli.losses("pfi", store=store, student=student)
    kdcli.losses("pkd", store=store, student=student)  # pairs cells, whatever their anchors


def test_losses_are_float32_under_autocast(stores: Path) -> None:
    store = kdcli.open_store(stores, "pkd")
    criterion = kdcli.losses("pkd", store=store, student={"features": 16})
    batch = store.read(store.batches(4)[0])
    student: dict[str, Tensor] = {"features@all": torch.randn(4, 257, 16)}
    exact = criterion(student, batch)["pkd_loss"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(criterion(student, batch)["pkd_loss"], exact)


def test_counts_are_those_of_the_entries(stores: Path) -> None:
    store = kdcli.open_store(stores, "rm")
    batch = store.read(store.batches(4)[0])
    assert batch.entries is not None
    for i, count in enumerate(batch.counts.tolist()):
        assert count == int((batch.entries.image == i).sum())
    assert int((batch.entries.flag & MAIN != 0).sum()) == len(batch.tensors["rank@main"])
