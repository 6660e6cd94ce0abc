"""LD: hand-computed values of its parts, and how the method puts them together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.methods.divergence import kl_rows
from kdcli.methods.ld import (
    CLASSES,
    EDGES,
    LD,
    MAIN_DIVISOR,
    VLR_DIVISOR,
    VLR_MASK_DIVISOR,
    class_kd,
    weighted_sum,
)
from kdcli.methods.ld_imitation import level_of
from kdcli.methods.resolve import resolve_options
from kdcli.structures import Batch
from kdcli.tensors import Region, Tensors
from tests.support.method_case import (
    CANVAS,
    NONE,
    ONE,
    TWO,
    K,
    both_sides,
    build,
    detector_of,
    inputs,
    make_batch,
    make_outputs,
    many_boxes,
    pair_of,
)

EXACT = 1e-6  # relative, of the values below
GFL = detector_of("gfl")


def test_kl_of_an_edge() -> None:
    student, teacher = torch.zeros(17), torch.arange(17.0)
    assert float(kl_rows(student, teacher, 1.0)) == pytest.approx(0.10544483, rel=EXACT)
    assert float(kl_rows(student, teacher, 10.0)) == pytest.approx(0.65834272, rel=EXACT)
    edge = kl_rows(student[None], teacher[None], 10.0)
    assert float(0.25 * weighted_sum(edge, torch.ones(1), MAIN_DIVISOR)) == pytest.approx(0.04114642, rel=EXACT)


def test_kl_is_a_mean_over_bins_and_not_symmetric() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    by_hand = (b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum(-1) / 7
    torch.testing.assert_close(kl_rows(a, b, 1.0), by_hand)
    assert not torch.allclose(kl_rows(a, b, 1.0), kl_rows(b, a, 1.0))
    torch.testing.assert_close(kl_rows(a + 3, b - 5, 1.0), by_hand)  # a softmax does not see a shift


def edges() -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher logits of 2 positives, 4 edges, 17 bins."""
    k = torch.arange(136, dtype=torch.float64)
    return torch.sin(0.37 * k).reshape(2, 4, 17), (2 * torch.cos(0.11 * k)).reshape(2, 4, 17)


def test_main_and_vlr_sums() -> None:
    loss = kl_rows(*edges(), 10.0).sum(dim=-1)
    main = 0.25 * weighted_sum(loss, torch.tensor([0.9, 0.3], dtype=torch.float64), MAIN_DIVISOR)
    vlr = 0.25 * weighted_sum(loss, torch.tensor([0.4, 0.2], dtype=torch.float64), VLR_DIVISOR)
    assert float(main) == pytest.approx(0.0077530156, rel=EXACT)
    assert float(vlr) == pytest.approx(0.00097662184, rel=EXACT)


def test_per_edge_against_joint_softmax() -> None:
    # RetinaNet's official code takes one softmax over all 68 logits; per edge with weight 5/16 is on its scale
    weight = torch.tensor([0.9, 0.3], dtype=torch.float64)
    student, teacher = edges()
    joint = 5 * weighted_sum(kl_rows(student.reshape(2, 68), teacher.reshape(2, 68), 10.0), weight, MAIN_DIVISOR)
    single = 5 / 16 * weighted_sum(kl_rows(student, teacher, 10.0).sum(dim=-1), weight, MAIN_DIVISOR)
    assert float(joint) == pytest.approx(0.0251948983, rel=EXACT)
    assert float(single) == pytest.approx(0.0096912697, rel=EXACT)


def test_class_kd() -> None:
    k = torch.arange(6, dtype=torch.float64)
    student, teacher = (torch.sin(0.5 * k) - 2).reshape(2, 3), (torch.cos(0.5 * k) - 1).reshape(2, 3)
    one_level = class_kd(student, teacher, torch.zeros(2, dtype=torch.int64), 1, 2.0)
    assert float(10 * one_level) == pytest.approx(0.2691261712, rel=EXACT)
    # a mean on each level, added up: alone on its level, a positive counts in full
    rows = kl_rows(student, teacher, 2.0)
    apart = class_kd(student, teacher, torch.tensor([0, 3]), 5, 2.0)
    assert float(apart) == pytest.approx(float(rows.sum()), rel=EXACT)
    assert float(one_level) == pytest.approx(float(rows.mean()), rel=EXACT)


def test_class_kd_without_positives_is_0() -> None:
    empty = torch.zeros(0, 3, requires_grad=True)
    loss = class_kd(empty, torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 5, 2.0)
    assert float(loss.detach()) == 0
    loss.backward()


def test_level_of_an_anchor() -> None:
    batch = make_batch(GFL, [ONE])
    sizes = GFL.grid.level_sizes(batch.targets.canvas)
    assert sizes == [192, 48, 12, 4, 1]
    index = torch.tensor([0, 191, 192, 239, 240, 251, 252, 255, 256])
    assert level_of(index, GFL.grid, batch).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def ld(**options: Any) -> LD:
    return LD(pair_of(GFL, GFL), **options)


def data(batch: Batch) -> tuple[Tensors, Tensors]:
    images = len(batch.keys)
    return (
        inputs(GFL, make_outputs(GFL, images, 1), LD.needs, batch),
        inputs(GFL, make_outputs(GFL, images, 2), LD.needs, batch),
    )


def test_the_method_is_the_sum_of_its_parts() -> None:
    batch = make_batch(GFL, [TWO, many_boxes(15)])
    ours, theirs = data(batch)
    terms = ld()(ours, theirs, batch)
    assert list(terms) == ["main", "vlr", "kd"]
    entries = batch.entries
    assert entries is not None
    union = entries.select("main+vlr")
    main, vlr = entries.select("main")[union], entries.select("vlr")[union]
    assert (main & vlr).any()  # GFL's regions overlap, as in the official code
    edge = kl_rows(ours[EDGES.key], theirs[EDGES.key], 10.0).sum(dim=-1)
    score = ours[CLASSES.key].sigmoid().amax(dim=-1)
    level = level_of(entries.index[union][main], GFL.grid, batch)
    kd = class_kd(ours[CLASSES.key], theirs[CLASSES.key], level, 5, 2.0)
    # batch_ref 2 and a batch of 2: the official sums, divided by no count
    torch.testing.assert_close(terms["main"], 0.25 * weighted_sum(edge[main], score, 4.0))
    torch.testing.assert_close(terms["vlr"], 0.25 * weighted_sum(edge[vlr], entries.weight[union][vlr], 16.0))
    torch.testing.assert_close(terms["kd"], 10 * kd)


def test_the_weight_of_a_positive_is_detached() -> None:
    batch = make_batch(GFL, [TWO])
    ours, theirs = data(batch)
    terms = ld()(ours, theirs, batch)
    wanted = [ours[CLASSES.key]]
    assert torch.autograd.grad(terms["main"], wanted, retain_graph=True, allow_unused=True)[0] is None


def test_batch_ref() -> None:
    batch = make_batch(GFL, [TWO, ONE])
    ours, theirs = data(batch)
    two, three = ld()(ours, theirs, batch), ld(batch_ref=3)(ours, theirs, batch)
    for part, factor in (("main", 1.5), ("vlr", 1.5), ("kd", 1.0)):  # kd is a mean already
        torch.testing.assert_close(three[part], factor * two[part])


def test_an_empty_image_halves_the_localization_terms() -> None:
    # the scale is by images, so an image without boxes takes its share; the class mean is over positives
    alone, joined = make_batch(GFL, [TWO]), make_batch(GFL, [TWO, NONE])
    two = ld()(*data(joined), joined)
    first = [{k: v[:1] for k, v in make_outputs(GFL, 2, seed).items()} for seed in (1, 2)]
    one = ld()(*(inputs(GFL, outputs, LD.needs, alone) for outputs in first), alone)
    for part, factor in (("main", 0.5), ("vlr", 0.5), ("kd", 1.0)):
        torch.testing.assert_close(two[part], factor * one[part])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, {"main", "vlr", "kd"}),
        ({"vlr": 0.0}, {"main", "kd"}),
        ({"weight": 0.0}, {"kd"}),
        ({"kd_weight": 0.0}, {"main", "vlr"}),
        ({"kd_weight": 0.0, "vlr": 0.0}, {"main"}),
    ],
)
def test_terms_of_weight_0_are_absent(options: dict[str, float], parts: set[str]) -> None:
    batch = make_batch(GFL, [TWO])
    assert set(ld(**options)(*data(batch), batch)) == parts


def test_the_vlr_weight_as_a_mask() -> None:
    batch = make_batch(GFL, [TWO, ONE])
    ours, theirs = data(batch)
    assert batch.entries is not None
    vlr = batch.entries.select("vlr")[batch.entries.select("main+vlr")]
    edge = kl_rows(ours[EDGES.key], theirs[EDGES.key], 10.0).sum(dim=-1)
    term = ld(vlr_weight="mask")(ours, theirs, batch)["vlr"]
    torch.testing.assert_close(term, 0.25 * edge[vlr].sum() / VLR_MASK_DIVISOR)


def test_temperatures() -> None:
    batch = make_batch(GFL, [TWO])
    ours, theirs = data(batch)
    plain, warm = ld()(ours, theirs, batch), ld(temperature=3, kd_temperature=8)(ours, theirs, batch)
    assert all(not torch.allclose(plain[part], warm[part]) for part in plain)
    same = ld(temperature=3)(ours, theirs, batch)
    torch.testing.assert_close(same["kd"], plain["kd"])


def test_saturated_logits_stay_finite() -> None:
    batch = make_batch(GFL, [TWO])
    ours, theirs = ({k: 1e4 * v for k, v in side.items()} for side in data(batch))
    terms = ld(temperature=1)(ours, theirs, batch)
    assert all(torch.isfinite(t) for t in terms.values())


@pytest.mark.parametrize(
    ("classes", "given", "says"),
    [(80, {}, ""), (6, {}, "0.75"), (3, {}, "0.38"), (1, {}, ""), (6, {"kd_weight": 2.0}, "")],
)
def test_the_published_class_weight_belongs_to_80_classes(classes: int, given: dict[str, float], says: str) -> None:
    warning = LD.warning("gfl", resolve_options("ld", LD, "gfl", given), classes)
    assert (warning or "").endswith(says and f"--set ld.kd_weight={says}")
    assert bool(warning) == bool(says)


def rows_of(method: str, boxes: list[Tensor], **options: Any) -> tuple[dict[str, Tensor], Batch, Tensors, Tensors]:
    """The terms of a variant of LD on GFL, the batch, and what the two nets gave it."""
    batch = make_batch(GFL, boxes)
    ld = build(method, "gfl", **options)
    ours, theirs = both_sides(ld, GFL, make_outputs(GFL, len(boxes), 1), GFL, make_outputs(GFL, len(boxes), 2), batch)
    return ld(ours, theirs, batch), batch, ours, theirs


def test_class_kd_on_the_vlr_by_loops() -> None:
    """LD's repository, whose factor 0 is ours to set: KL of the class logits, mean over a level's VLR, sum over levels."""
    terms, batch, ours, theirs = rows_of("ld", [TWO, ONE], vlr_kd_weight=3.0, kd_temperature=2.0)
    assert batch.entries is not None
    entries = batch.entries
    level = level_of(entries.index[entries.select(Region.VLR)], GFL.grid, batch)
    student, teacher = ours["cls_logits@vlr"], theirs["cls_logits@vlr"]
    expected = 0.0
    for k in level.unique():
        rows = [i for i in range(len(level)) if level[i] == k]
        losses = []
        for i in rows:
            p, q = (teacher[i].detach() / 2).softmax(0), (student[i].detach() / 2).softmax(0)
            losses.append(4 * float((p * (p / q).log()).sum()) / K)
        expected += sum(losses) / len(losses)
    assert len(level.unique()) > 1
    assert float(terms["vlr_kd"].detach()) == pytest.approx(3 * expected, rel=1e-5)
    assert "vlr_kd" not in rows_of("ld", [TWO])[0]
    assert float(rows_of("ld", [NONE], vlr_kd_weight=3.0)[0]["vlr_kd"].detach()) == 0


def test_one_class_has_no_class_term() -> None:
    net = detector_of("gfl", classes=1)
    ld = LD(pair_of(net, net), vlr_kd_weight=1.0)
    assert (ld.kd_weight, ld.vlr_kd_weight) == (0.0, 0.0)


@pytest.mark.parametrize("kind", ["fitnet", "inside_gt", "main", "defeat"])
def test_imitation_by_loops_over_cells(kind: str) -> None:
    """Means over a level's chosen cells and channels, summed over the levels that have a positive, times the weight 2."""
    boxes = [TWO, ONE, NONE]
    terms, batch, _, _ = rows_of(f"ld:{kind}", boxes)
    ours, theirs = (make_outputs(GFL, 3, seed)["features"].detach() for seed in (1, 2))
    start, expected = 0, 0.0
    for (rows, columns), stride in zip(GFL.grid.level_shapes(CANVAS), GFL.grid.strides, strict=True):
        chosen: dict[bool, list[float]] = {True: [], False: []}
        positives = 0
        for image in range(3):
            for y in range(rows):
                for x in range(columns):
                    cell = start + y * columns + x
                    if not batch.targets.valid[image, cell]:
                        continue
                    error = float((ours[image, cell] - theirs[image, cell]).square().mean())
                    positive = bool(batch.targets.assigned[image, cell] >= 0)
                    positives += positive
                    within = any(b[0] < x * stride < b[2] and b[1] < y * stride < b[3] for b in boxes[image].tolist())
                    inside = {"fitnet": True, "main": positive}.get(kind, within)
                    chosen[inside].append(error)
        start += rows * columns
        if not positives or not chosen[True]:
            continue
        expected += sum(chosen[True]) / len(chosen[True])
        if kind == "defeat":
            expected += 2 * sum(chosen[False]) / len(chosen[False])
    assert float(terms["imitation"].detach()) == pytest.approx(2 * expected, rel=1e-5)
    assert expected > 0
