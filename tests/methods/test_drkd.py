"""DRKD's regions, norms and terms, against loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kdcli.geometry.rois import gt_rois
from kdcli.methods.base import method_options
from kdcli.methods.drkd import DRKD, DRKDLite, InstanceRelation, PixelRelation, batch_norms, image_norms
from kdcli.methods.reduce import safe_sqrt
from kdcli.methods.resolve import resolve_options
from tests.support.feature_case import (
    CANVAS,
    GRID,
    KEY,
    NONE,
    ONE,
    TWO,
    check_common,
    grad,
    make_batch,
    make_pair,
    maps,
    number,
    run,
)
from tests.support.relation import relation_by_hand

ROI_KEY = "gt_rois@gt"


def test_drkd_does_what_every_method_must() -> None:
    torch.manual_seed(0)
    check_common(DRKD)


def test_rois_are_the_average_of_bilinear_samples() -> None:
    """A map that is linear in x and y is sampled exactly: a cell of the region has the value at its centre."""
    shapes = GRID.level_shapes(CANVAS)
    levels = []
    for (h, w), stride in zip(shapes, GRID.strides, strict=True):
        y, x = torch.meshgrid(torch.arange(h) * stride, torch.arange(w) * stride, indexing="ij")
        levels.append(torch.stack([x.flatten(), y.flatten()], dim=1).float())
    features = torch.cat(levels)[None].repeat(2, 1, 1)
    boxes = [torch.tensor([[16.0, 24.0, 64.0, 60.0]]), torch.tensor([[8.0, 8.0, 80.0, 40.0], [30.0, 20.0, 66.0, 44.0]])]
    found = gt_rois(features, boxes, GRID, CANVAS)
    assert found.shape == (3, 2, 2, 3, 3)
    for region, (x1, y1, x2, y2) in zip(found, torch.cat(boxes).tolist(), strict=True):
        for level in range(2):
            for i in range(3):
                for j in range(3):
                    assert number(region[level, 0, i, j]) == pytest.approx(x1 + (j + 0.5) / 3 * (x2 - x1), abs=1e-3)
                    assert number(region[level, 1, i, j]) == pytest.approx(y1 + (i + 0.5) / 3 * (y2 - y1), abs=1e-3)


def test_rois_of_empty_images_of_bf16_and_of_the_other_orientation() -> None:
    features = maps(2)
    none = gt_rois(features, [NONE, NONE], GRID, CANVAS)
    assert none.shape == (0, 2, 8, 3, 3)
    none.sum().backward()
    assert not grad(features).any()
    found = gt_rois(features.bfloat16(), [ONE, NONE], GRID, CANVAS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gt_rois(features, [ONE, NONE], GRID, CANVAS), rtol=0.02, atol=0.02)
    assert gt_rois(features, [ONE, TWO[:, [1, 0, 3, 2]]], GRID, CANVAS.transposed).shape == (3, 2, 8, 3, 3)


def test_the_norms_are_unsquared_per_image_or_over_the_batch() -> None:
    difference = torch.randn(5, 7)
    expected = difference[:2].norm() + difference[2:].norm()
    torch.testing.assert_close(image_norms(difference, [2, 0, 3]), expected)
    torch.testing.assert_close(image_norms(2 * difference, [2, 0, 3]), 2 * expected)  # homogeneous of degree 1
    squares = torch.tensor([9.0, 0.0, 16.0])
    assert number(batch_norms(squares)) == 7


def test_a_norm_of_0_has_the_gradient_0() -> None:
    value = torch.tensor([0.0, 4.0], requires_grad=True)
    safe_sqrt(value).sum().backward()
    assert grad(value).tolist() == [0.0, 0.25]
    assert number(image_norms(torch.zeros(0, 7), [0, 0])) == 0


def test_pixel_relation_is_the_norm_over_valid_cells_of_all_images() -> None:
    torch.manual_seed(0)
    module = PixelRelation(4, 6, 2)
    ours, theirs = [torch.randn(2, n, 4) for n in (8, 3)], [torch.randn(2, n, 6) for n in (8, 3)]
    valid = [torch.rand(2, n) > 0.3 for n in (8, 3)]
    expected = 0.0
    for i in range(2):
        difference = module.adapters[i](module.student[i](ours[i])) - module.teacher[i](theirs[i])
        expected += math.sqrt(number(difference[valid[i]].square().sum()))
    assert number(module(ours, theirs, valid)) == pytest.approx(expected, rel=1e-5)
    assert [m.project.out_features for m in PixelRelation(4, 4, 5).student] == [64, 64, 256, 256, 256]


def test_instance_relation_by_images_and_levels() -> None:
    torch.manual_seed(0)
    module = InstanceRelation(4, 6, 0.5, 0.25, "none")
    ours, theirs = torch.randn(3, 2, 4, 3, 3), torch.randn(3, 2, 6, 3, 3)
    batch = make_batch([ONE, NONE, TWO])
    terms = module(ours, theirs, batch, torch.tensor(3.0))
    ir = ins = 0.0
    for level in range(2):
        for rows in (slice(0, 1), slice(1, 3)):
            s, t = ours[rows, level], theirs[rows, level]
            n = len(s)

            def adapted(name: str, value: Tensor, level: int = level) -> Tensor:
                layer = module.adapters[f"{name}{level}"]
                weight, bias = layer.weight, layer.bias
                return nn.functional.conv2d(value, weight[:, :, None, None], bias)

            ins += number((adapted("ins", s) - t).norm())
            s = relation_by_hand(module.student[level], s.reshape(n, -1), False).reshape(n, 4, 3, 3)
            t = relation_by_hand(module.teacher[level], t.reshape(n, -1), False).reshape(n, 6, 3, 3)
            ir += number((adapted("ir", s) - t).norm())
    assert number(terms["ir"]) == pytest.approx(3 * 0.5 * ir, rel=1e-4)
    assert number(terms["ins"]) == pytest.approx(3 * 0.25 * ins, rel=1e-4)


def test_drkd_is_its_parts() -> None:
    torch.manual_seed(0)
    batch, ours, theirs = make_batch([TWO, NONE, ONE]), maps(3, seed=1), maps(3, seed=2)
    method = DRKD(make_pair())
    terms = run(method, ours, theirs, batch)
    assert list(terms) == ["pr", "ir", "ins"]
    inside = batch.targets.valid[..., None]
    clean = [(v * inside).detach() for v in (ours, theirs)]
    split = [
        torch.split(v, [h * w for h, w in GRID.level_shapes(CANVAS)], dim=1) for v in (*clean, batch.targets.valid)
    ]
    assert method.pixels is not None
    pr = 4e-3 * math.sqrt(2 / 3) * method.pixels(*(list(v) for v in split))
    torch.testing.assert_close(terms["pr"], pr)
    rois = [gt_rois(v, batch.targets.boxes, GRID, CANVAS) for v in clean]
    rest = method.instances(*rois, batch, torch.tensor(2 / 3))
    torch.testing.assert_close(terms["ir"], rest["ir"])
    torch.testing.assert_close(terms["ins"], rest["ins"])


def lite(ours: Tensor, theirs: Tensor, boxes: list[Tensor], method: DRKDLite) -> dict[str, Tensor]:
    terms: dict[str, Tensor] = method({ROI_KEY: ours}, {ROI_KEY: theirs}, make_batch(boxes))
    return terms


def test_drkd_lite_is_drkd_without_pixels() -> None:
    torch.manual_seed(0)
    whole, small = DRKD(make_pair(6, 10)), DRKDLite(make_pair(6, 10))
    small.instances.load_state_dict(whole.instances.state_dict())
    boxes = [TWO, ONE]
    batch = make_batch(boxes, (96, 128))  # everything is valid
    ours, theirs = maps(2, 6, 1), maps(2, 10, 2)
    terms = run(whole, ours, theirs, batch)
    rois = [gt_rois(v, boxes, GRID, CANVAS) for v in (ours, theirs)]
    found = lite(*rois, boxes, small)
    assert list(found) == ["ir", "ins"]
    for part, term in found.items():
        torch.testing.assert_close(term, terms[part])
    assert [n.key for n in DRKDLite.needs] == [ROI_KEY]


@pytest.mark.parametrize("relation_filter", ["gate", "none", "random_official"])
@pytest.mark.parametrize("boxes", [[NONE], [NONE, NONE], [ONE], [TWO, NONE, ONE]])
def test_drkd_lite_with_few_boxes(boxes: list[Tensor], relation_filter: str) -> None:
    torch.manual_seed(0)
    method = DRKDLite(make_pair(), relation_filter=relation_filter)  # type: ignore[arg-type]
    total = sum(len(b) for b in boxes)
    ours, theirs = (torch.randn(total, 2, 8, 3, 3, requires_grad=True) for _ in range(2))
    terms = lite(ours, theirs, boxes, method)
    for part, term in terms.items():
        assert term.requires_grad
        assert bool(term > 0) == bool(total) == method.active(make_batch(boxes), part)
    torch.stack(list(terms.values())).sum().backward()
    assert theirs.grad is None
    assert torch.isfinite(grad(ours)).all()
    assert bool(grad(ours).any()) == bool(total)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())


def test_modules_on_both_sides_learn() -> None:
    torch.manual_seed(0)
    method = DRKD(make_pair(6, 10))
    terms = run(method, maps(2, 6, 1), maps(2, 10, 2), make_batch([TWO, ONE]))
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in method.named_parameters():
        if "key.bias" not in name:  # a softmax does not see what is added to a whole row
            assert grad(parameter).abs().sum() > 0, name


def test_a_part_of_weight_0_is_absent_and_brings_no_parameters() -> None:
    batch, ours, theirs = make_batch([TWO]), maps(1, seed=1), maps(1, seed=2)
    only_pr = DRKD(make_pair(), ir_weight=0.0, ins_weight=0.0)
    assert list(run(only_pr, ours, theirs, batch)) == ["pr"]
    assert list(only_pr.instances.parameters()) == []
    only_ins = DRKD(make_pair(), pr_weight=0.0, ir_weight=0.0)
    assert list(run(only_ins, ours, theirs, batch)) == ["ins"]
    assert sum(p.numel() for p in only_ins.parameters()) == 2 * (8 * 8 + 8)
    assert run(DRKD(make_pair(), pr_weight=0.0, ir_weight=0.0, ins_weight=0.0), ours, theirs, batch) == {}


def test_weights_scale_and_batch_ref_does_what_it_says() -> None:
    batch, ours, theirs = make_batch([TWO]), maps(1, seed=1), maps(1, seed=2)
    torch.manual_seed(0)
    method = DRKD(make_pair())
    once = run(method, ours, theirs, batch)
    method.batch_ref = 8.0
    eight = run(method, ours, theirs, batch)
    assert number(eight["pr"]) == pytest.approx(2 * number(once["pr"]), rel=1e-5)
    assert number(eight["ir"]) == pytest.approx(4 * number(once["ir"]), rel=1e-5)
    torch.manual_seed(0)
    thrice = run(DRKD(make_pair(), pr_weight=12e-3, ir_weight=15e-3, ins_weight=18e-3), ours, theirs, batch)
    for part, term in once.items():
        assert number(thrice[part]) == pytest.approx(3 * number(term), rel=1e-5)


def test_weights_by_detector_and_names() -> None:
    options = resolve_options("drkd", DRKD, "faster_rcnn", {})
    assert (options["pr_weight"], options["ir_weight"], options["ins_weight"]) == (1e-3, 4e-3, 2.4e-3)
    options = resolve_options("drkd", DRKD, "gfl", {})
    assert (options["pr_weight"], options["ir_weight"], options["ins_weight"]) == (4e-3, 5e-3, 6e-3)
    for method in (DRKD, DRKDLite):
        parts = [o.removesuffix("_weight") for o in method_options(method) if o.endswith("_weight")]
        assert [method(make_pair()).weight_option(p) for p in parts] == [f"{p}_weight" for p in parts]


def test_the_students_padding_is_not_read_even_when_draws_are_missing() -> None:
    batch = make_batch([ONE])
    batch = replace(batch, targets=replace(batch.targets, draws=None))  # read by random_official alone
    method = DRKD(make_pair())
    ours = maps(1, seed=1)
    sum(method({KEY: ours}, {KEY: maps(1, seed=2)}, batch).values()).backward()
    assert not grad(ours)[~batch.targets.valid].any()
