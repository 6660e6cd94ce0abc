"""DRKD's trained modules, GloRe and the relation block, against loops and the authors' parameter counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdcli.methods.glore import GloRe, WorldBatchNorm
from kdcli.methods.relation import RelationBlock, random_filter
from tests.support.feature_case import grad
from tests.support.relation import relation_by_hand


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_authors_modules() -> None:
    assert count(GloRe(256, 64)) == 103_168
    assert count(GloRe(256, 256)) == 656_896
    assert count(RelationBlock(2304, "none")) == 10_622_592
    assert count(RelationBlock(2304, "random_official")) == 10_622_592
    assert count(RelationBlock(2304, "gate")) == 10_622_592 + 2 * (2304 * 64 + 64)


def test_glore_is_the_written_formula() -> None:
    """Convolutions over channels, nodes and states, image by image, with torch's own batch norm."""
    torch.manual_seed(0)
    module, x = GloRe(6, 4), torch.randn(2, 5, 6)
    nn.init.normal_(module.norm.weight)
    nn.init.normal_(module.norm.bias)
    mapped = []
    for image in x:
        maps_ = image.T  # [C, HW]
        states = module.state.weight @ maps_ + module.state.bias[:, None]
        nodes = module.project.weight @ maps_ + module.project.bias[:, None]
        graph = states @ nodes.T  # [C1, C2]
        hidden = (graph @ module.mix_nodes.weight.T + module.mix_nodes.bias + graph).clamp(min=0)
        mapped.append(module.extend.weight @ (module.mix_states.weight @ hidden @ nodes))
    norm = nn.functional.batch_norm(
        torch.stack(mapped), None, None, module.norm.weight, module.norm.bias, training=True, eps=1e-4
    )
    torch.testing.assert_close(module(x), x + norm.mT, rtol=1e-4, atol=1e-4)


def test_batch_norm_accepts_a_single_cell() -> None:
    norm, value = WorldBatchNorm(3), torch.randn(1, 1, 3, requires_grad=True)
    found = norm(value)
    assert not found.any()
    found.sum().backward()
    assert torch.isfinite(grad(value)).all()


@pytest.mark.parametrize("relation_filter", ["gate", "none"])
def test_boxes_attend_to_those_of_their_own_image(relation_filter: str) -> None:
    torch.manual_seed(0)
    block, regions = RelationBlock(18, relation_filter), torch.randn(5, 18)  # type: ignore[arg-type]
    found = block(regions, [3, 0, 1, 1], None)
    gate = relation_filter == "gate"
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
        torch.testing.assert_close(found[part], relation_by_hand(block, regions[part], gate), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("relation_filter", ["gate", "none"])
def test_the_relation_block_is_permutation_equivariant(relation_filter: str) -> None:
    torch.manual_seed(0)
    block, regions, order = RelationBlock(36, relation_filter), torch.randn(6, 36), torch.randperm(6)  # type: ignore[arg-type]
    torch.testing.assert_close(block(regions[order], [6], None), block(regions, [6], None)[order])


def test_the_official_filter_is_random_and_of_the_image_and_epoch_alone() -> None:
    torch.manual_seed(0)
    regions, counts = torch.randn(5, 18), [2, 3]
    same = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()
    draws = torch.tensor([11, 12])
    found = random_filter(regions, same, counts, draws, 0)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(5))
    assert not found[~same].any()
    assert torch.equal(found, random_filter(regions, same, counts, draws, 0))
    assert not torch.equal(found, random_filter(regions, same, counts, draws, 1))  # another block
    assert not torch.equal(found, random_filter(regions, same, counts, draws + 1, 0))  # another epoch
    alone = random_filter(regions[2:], same[2:, 2:], [3], draws[1:], 0)
    torch.testing.assert_close(alone, found[2:, 2:])
    block = RelationBlock(18, "random_official")
    assert torch.isfinite(block(regions, counts, draws)).all()
