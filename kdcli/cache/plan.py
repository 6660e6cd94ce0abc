"""Decides how a store holds what methods need: the encoding of each tensor, and how many rows make a shard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kdcli.cache import encodings
from kdcli.cache.encodings import Encoding
from kdcli.cache.schema import MAX_SHARD_ROWS, SHARD_BYTES, StoredTensor
from kdcli.tensors import (
    BACKBONE,
    BOX_DISTRIBUTION,
    BOXES,
    CLS_LOGITS,
    FEATURES,
    PROPOSAL_BOXES,
    Need,
    TensorSpec,
    spec_of,
)


def plan_tensors(
    needs: Iterable[Need], specs: Mapping[str, TensorSpec], encoding: str = "default"
) -> tuple[StoredTensor, ...]:
    """Choose an encoding for each need: ``default`` (8-bit where it is safe), ``float16`` or ``lossless`` (float32)."""
    planned = []
    for need in sorted(set(needs)):
        spec = spec_of(need.name, specs)
        chosen: Encoding = encodings.FLOAT32
        if encoding == "float16":
            chosen = encodings.FLOAT16
        elif encoding == "default":
            chosen = _default_encoding(need)
        planned.append(StoredTensor(need, spec.per, spec.dims, chosen))
    return tuple(planned)


def _default_encoding(need: Need) -> Encoding:
    if need.name == BOX_DISTRIBUTION:
        return encodings.VectorAffine8()
    if need.name == FEATURES or need.name in BACKBONE:
        # a region has no levels to share a range over: each cell has its own
        return encodings.ChannelAffine8() if need.dense else encodings.VectorAffine8()
    if need.name == CLS_LOGITS and need.dense:
        return encodings.LogOdds8()
    if need.name in (BOXES, PROPOSAL_BOXES):
        return encodings.Box16() if need.dense else encodings.FLOAT32
    return encodings.FLOAT16  # class logits on main and ranks: a prototype lost 4e-3 of RM to 8 bits, 5e-5 to these


def shard_rows_for(row_bytes: int) -> int:
    """Rows per shard so that one shard's raw bytes stay under SHARD_BYTES."""
    return max(1, min(MAX_SHARD_ROWS, SHARD_BYTES // row_bytes))
