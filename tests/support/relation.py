"""DRKD's relation block, pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcli.methods.relation import RelationBlock


def relation_by_hand(block: RelationBlock, regions: Tensor, gate: bool) -> Tensor:
    """One image, box by box."""
    q, k, v = block.query(regions), block.key(regions), block.value(regions)
    rows = []
    for i in range(len(regions)):
        logits = []
        for j in range(len(regions)):
            logit = q[i] @ k[j]
            if gate:
                u, w = block.gate_query(regions[i]), block.gate_key(regions[j])
                logit = logit * torch.sigmoid(u @ w / 8 + 2)
            logits.append(logit)
        weight = torch.stack(logits).softmax(dim=0)
        rows.append(block.out(sum(weight[j] * v[j] for j in range(len(regions)))) + regions[i])
    return torch.stack(rows)
