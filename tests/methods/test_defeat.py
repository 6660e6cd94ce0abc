"""DeFeat: its decoupled sums, the adapters, and the parts that are off by default."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kdcli.errors import OptionError
from kdcli.geometry.defeat_mask import defeat_cells, stage_cells
from kdcli.methods.base import Pair, method_options
from kdcli.methods.decoupled import INIT_SCALE, adapter, decoupled_imitation
from kdcli.methods.defeat import PROPOSALS, STAGES, DeFeat, decoupled_kl
from kdcli.methods.maps import MAPS
from kdcli.methods.resolve import resolve_options
from kdcli.tensors import PROPOSAL_BOXES, PROPOSAL_LABELS, PROPOSAL_LOGITS, TensorSpec
from tests.support.defeat_case import GFL, SCENE, SIZES, data, halved, warm
from tests.support.method_case import CANVAS, NONE, ONE, TWO, detector_of, make_batch, pair_of

TEACHER = detector_of("gfl", 64)


def defeat(teacher: Any = GFL, **options: Any) -> DeFeat:
    """With adapters that do something."""
    method = DeFeat(pair_of(GFL, teacher), **options)
    warm(method)
    return method


def test_decoupled_sums_by_hand() -> None:
    error = [torch.tensor([[1.0, 2.0, 3.0, 40.0]]), torch.tensor([[5.0]])]
    inside = [torch.tensor([[True, False, False, True]]), torch.tensor([[True]])]
    valid = [torch.tensor([[True, True, True, False]]), torch.tensor([[True]])]
    foreground, background = decoupled_imitation(error, inside, valid)
    assert float(foreground) == pytest.approx((1 / 2 + 5 / 2) / 2)
    assert float(background) == pytest.approx(((2 + 3) / 4 + 0) / 2)  # no background on the second level: 0


def test_the_method_is_the_sum_of_its_parts() -> None:
    batch = make_batch(GFL, SCENE)
    ours, theirs = data(batch, 64)
    method = defeat(TEACHER)
    terms = method(ours, theirs, batch)
    assert list(terms) == ["object", "background"]
    kept = ours[MAPS.key] * batch.targets.valid[..., None]
    sums = {"object": torch.zeros(()), "background": torch.zeros(())}
    start = 0
    for conv, (rows, columns) in zip(method.adapters, GFL.grid.level_shapes(CANVAS), strict=True):
        level = slice(start, start + rows * columns)
        start += rows * columns
        image = kept[:, level].transpose(1, 2).reshape(4, 32, rows, columns)
        target = theirs[MAPS.key][:, level].transpose(1, 2).reshape(4, 64, rows, columns)
        square = (conv(image) - target) ** 2
        inside = torch.stack([defeat_cells(b, GFL.grid, CANVAS)[level] for b in SCENE])
        for part, mask in (("object", inside), ("background", ~inside)):
            cells = (mask & batch.targets.valid[:, level]).reshape(4, 1, rows, columns)
            count = cells.sum() * 64  # over batch x channels x cells
            sums[part] = sums[part] + (square * cells).sum() / (2 * count).clamp(min=1) / 5
    torch.testing.assert_close(terms["object"], 4 * sums["object"])
    torch.testing.assert_close(terms["background"], 16 * sums["background"])


def test_where_gradients_go() -> None:
    batch = make_batch(GFL, SCENE)
    ours, theirs = data(batch)
    theirs[MAPS.key].requires_grad_()
    method = DeFeat(pair_of(GFL, GFL))  # also with its almost zero initial weights
    torch.stack(list(method(ours, theirs, batch).values())).sum().backward()
    gradient = ours[MAPS.key].grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert gradient[batch.targets.valid].any()
    assert not gradient[~batch.targets.valid].any()
    assert theirs[MAPS.key].grad is None
    for parameter in method.parameters():
        assert parameter.grad is not None
        assert parameter.grad.any()


def test_padding_is_never_read() -> None:
    batch = make_batch(GFL, [TWO, ONE])
    ours, theirs = data(batch)
    method = defeat()
    before = method(ours, theirs, batch)
    changed = [{k: v.detach().clone() for k, v in side.items()} for side in (ours, theirs)]
    for side in changed:
        side[MAPS.key][~batch.targets.valid] = 50.0
    after = method(*changed, batch)
    assert all(float(before[part].detach()) == float(after[part].detach()) for part in before)


def test_adapters() -> None:
    torch.manual_seed(0)
    conv = adapter(16, 24)
    assert conv.weight.shape == (24, 16, 3, 3)
    assert conv.weight.abs().max() < 2 * INIT_SCALE
    # a normal's remainder by 2 has a deviation of .866
    assert float(conv.weight.detach().std()) == pytest.approx(INIT_SCALE * 0.866, rel=0.05)
    assert conv.bias is not None
    assert conv.bias.any()  # PyTorch's own initialisation
    assert len(DeFeat(pair_of(GFL, GFL)).adapters) == 5  # also when the channels agree


def test_the_transposed_canvas() -> None:
    batch = make_batch(GFL, [TWO])
    ours, theirs = data(batch)
    upright = replace(batch.targets, canvas=CANVAS.transposed, valid=torch.ones(1, sum(SIZES), dtype=torch.bool))
    terms = defeat()(ours, theirs, replace(batch, targets=upright))
    assert all(torch.isfinite(t) and t > 0 for t in terms.values())


def test_without_boxes() -> None:
    batch = make_batch(GFL, [NONE, NONE])
    ours, theirs = data(batch)
    method = defeat()
    terms = method(ours, theirs, batch)
    assert float(terms["object"].detach()) == 0
    assert terms["object"].requires_grad
    assert float(terms["background"].detach()) > 0
    assert not method.active(batch, "object")
    assert method.active(batch, "background")


@pytest.mark.parametrize("images", [2, 5])
def test_the_batch_size_does_not_change_a_term(images: int) -> None:
    batch = make_batch(GFL, [TWO])
    ours, theirs = data(batch)
    method = defeat()
    alone = method(ours, theirs, batch)
    many = ({k: v.repeat(images, 1, 1) for k, v in side.items()} for side in (ours, theirs))
    together = method(*many, make_batch(GFL, [TWO] * images))
    for part, term in together.items():
        torch.testing.assert_close(term, alone[part], rtol=1e-5, atol=0)


def test_two_processes_agree_with_one() -> None:
    batch = make_batch(GFL, SCENE)
    ours, theirs = data(batch)
    method = defeat()
    one, two = method(ours, theirs, batch), halved(method, ours, theirs, batch)
    for part, term in one.items():
        torch.testing.assert_close(two[part], term, rtol=1e-5, atol=0)


def test_options() -> None:
    batch = make_batch(GFL, SCENE)
    ours, theirs = data(batch)
    once, thrice = defeat()(ours, theirs, batch), defeat(fg_weight=12, bg_weight=48)(ours, theirs, batch)
    for part, term in once.items():
        torch.testing.assert_close(thrice[part], 3 * term)
    assert set(defeat(fg_weight=0)(ours, theirs, batch)) == {"background"}
    assert set(defeat(bg_weight=0)(ours, theirs, batch)) == {"object"}
    off = DeFeat(pair_of(GFL, GFL), fg_weight=0, bg_weight=0)
    assert off({}, {}, batch) == {}
    assert list(off.parameters()) == []  # one that no loss reaches would stop DDP
    parts = ("object", "background", "backbone_object", "backbone_background", "cls_object", "cls_background")
    known = method_options(DeFeat)
    assert [off.weight_option(p) for p in parts] == [
        "fg_weight",
        "bg_weight",
        *["backbone_weight"] * 2,
        "obj_cls_weight",
        "bg_cls_weight",
    ]
    assert all(off.weight_option(p) in known for p in parts)


@pytest.mark.parametrize(
    ("given", "needs"),
    [
        ({}, (MAPS,)),
        ({"backbone_weight": 1.0}, (MAPS, *STAGES)),
        ({"obj_cls_weight": 2.0}, (MAPS, *PROPOSALS)),
        ({"fg_weight": 0.0, "bg_weight": 0.0, "bg_cls_weight": 2.0}, PROPOSALS),
        ({"fg_weight": 0.0, "bg_weight": 0.0, "backbone_weight": 1.0}, ()),
    ],
)
def test_what_it_reads(given: dict[str, float], needs: tuple[Any, ...]) -> None:
    assert DeFeat.reads(resolve_options("defeat", DeFeat, "gfl", given)) == needs


# The backbone.


def with_backbone(student: int = 48, teacher: int = 24, level: str = "level1") -> Pair:
    """Backbone stages of so many channels, on the levels of strides 16 and 32."""
    sides = []
    for channels in (student, teacher):
        names = {need.name: TensorSpec(f"level{i + 1}", (channels * (i + 1),)) for i, need in enumerate(STAGES)}
        sides.append({**GFL.specs(), **names})
    sides[1][STAGES[0].name] = TensorSpec(level, (teacher,))
    return Pair(sides[0], sides[1], GFL.grid, CANVAS, "gfl")


def test_backbone_stages() -> None:
    batch = make_batch(GFL, SCENE)
    ours, theirs = data(batch)
    generator = torch.Generator().manual_seed(5)
    for i, need in enumerate(STAGES):
        for side, channels in ((ours, 48), (theirs, 24)):
            side[need.key] = torch.randn(4, SIZES[i + 1], channels * (i + 1), generator=generator).requires_grad_()
    method = DeFeat(with_backbone(), backbone_weight=0.5)
    warm(method)
    terms = method(ours, theirs, batch)
    assert list(terms) == ["object", "background", "backbone_object", "backbone_background"]
    sums = {"object": torch.zeros(()), "background": torch.zeros(())}
    valid = batch.targets.valid.split(SIZES, dim=1)
    for i, need in enumerate(STAGES):
        rows, columns = GFL.grid.level_shapes(CANVAS)[i + 1]
        kept = (ours[need.key] * valid[i + 1][..., None]).transpose(1, 2).reshape(4, -1, rows, columns)
        adapted = torch.relu(method.stage_adapters[i][0](kept)).flatten(2).transpose(1, 2)
        square = (adapted - theirs[need.key]) ** 2
        inside = torch.stack([stage_cells(b, GFL.grid, CANVAS, i + 1) for b in SCENE])
        for part, mask in (("object", inside), ("background", ~inside)):
            sums[part] = sums[part] + square[mask & valid[i + 1]].mean() / 2 / 2  # half the mean; two stages
    torch.testing.assert_close(terms["backbone_object"], 0.5 * 4 * sums["object"])
    torch.testing.assert_close(terms["backbone_background"], 0.5 * 16 * sums["background"])
    torch.stack(list(terms.values())).sum().backward()
    assert all(ours[need.key].grad is not None and theirs[need.key].grad is None for need in STAGES)
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())


def test_a_net_without_such_stages() -> None:
    specs = {k: v for k, v in GFL.specs().items() if not k.startswith("backbone/")}
    with pytest.raises(OptionError, match="backbone/c4, which the student"):
        DeFeat(Pair(specs, specs, GFL.grid, CANVAS, "gfl"), backbone_weight=1.0)
    with pytest.raises(OptionError, match="strides of student and teacher differ"):
        DeFeat(with_backbone(level="level0"), backbone_weight=1.0)


# Classes of proposals.


def test_decoupled_kl_by_hand() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator)
    labels = torch.tensor([0, 3, 2, 3, 3, 1])
    positive, negative = decoupled_kl(student, teacher, labels, 3, 2.0, 5.0)
    for value, rows, t in ((positive, labels < 3, 2.0), (negative, labels == 3, 5.0)):
        p, q = (teacher[rows] / t).softmax(-1), (student[rows] / t).softmax(-1)
        by_hand = t * t * (p * (p / q).log()).sum() / rows.sum()  # summed over classes, mean over proposals
        torch.testing.assert_close(value, by_hand)


@pytest.mark.parametrize("label", [0, 3])
def test_without_proposals_of_a_kind(label: int) -> None:
    student = torch.randn(5, 4, requires_grad=True)
    parts = decoupled_kl(student, torch.randn(5, 4), torch.full((5,), label), 3, 1.0, 1.0)
    assert [float(part.detach()) > 0 for part in parts] == [label < 3, label == 3]
    torch.stack(parts).sum().backward()


def test_class_terms() -> None:
    names = {PROPOSAL_BOXES: TensorSpec("proposal", (4,)), PROPOSAL_LOGITS: TensorSpec("proposal", (4,))}
    specs = {**GFL.specs(), **names}
    pair = Pair(specs, specs, GFL.grid, CANVAS, "faster_rcnn")
    method = DeFeat(pair, fg_weight=0, bg_weight=0, obj_cls_weight=2, bg_cls_weight=3, bg_temperature=2)
    batch, key = make_batch(GFL, [TWO]), PROPOSALS[1].key
    ours, theirs = {key: torch.randn(7, 4, requires_grad=True)}, {key: torch.randn(7, 4)}
    theirs[PROPOSAL_LABELS] = torch.tensor([0, 3, 3, 1, 3, 3, 2])
    terms = method(ours, theirs, batch)
    positive, negative = decoupled_kl(ours[key], theirs[key], theirs[PROPOSAL_LABELS], 3, 1.0, 2.0)
    torch.testing.assert_close(terms["cls_object"], 2 * positive)
    torch.testing.assert_close(terms["cls_background"], 3 * negative)


def test_class_terms_need_proposals() -> None:
    with pytest.raises(OptionError, match="proposals/boxes, which the student"):
        DeFeat(pair_of(GFL, GFL), obj_cls_weight=2.0)
