"""Decides how a store holds what methods need: the encoding of each tensor, and how many rows make a shard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kdcli.store import encodings
from kdcli.store.arrays import StoredTensor
from kdcli.store.encodings import Encoding
from kdcli.store.schema import MAX_SHARD_ROWS, SHARD_BYTES
from kdcli.tensors import (
    BACKBONE,
    BOX_DISTRIBUTION,
    BOXES,
    CLS_LOGITS,
    FEATURES,
    PROPOSAL_BOXES,
    Need,
    Region,
    TensorSpec,
    spec_of,
)


def plan_tensors(
    needs: Iterable[Need], specs: Mapping[str, TensorSpec], encoding: str = "default"
) -> tuple[StoredTensor, ...]:
    """Choose an encoding for each need.

    ``default`` (8-bit where it is safe), ``compact`` (6 bits for box distributions and features: a fifth to a quarter
    smaller, with ten times the error), ``float16`` or ``lossless`` (float32).
    """
    planned = []
    for need in sorted(set(needs)):
        spec = spec_of(need.name, specs)
        chosen: Encoding = encodings.FLOAT32
        if encoding == "float16":
            chosen = encodings.FLOAT16
        elif encoding in ("default", "compact"):
            chosen = _default_encoding(need, 8 if encoding == "default" else 6)
        planned.append(StoredTensor(need, spec.per, spec.dims, chosen))
    return tuple(planned)


def derived_from_dense(needs: Iterable[Need], encoding: str = "default") -> tuple[Need, ...]:
    """The needs at entries, sorted, that the dense tensor of the same name holds as exactly: these are not stored twice.

    With the default encodings that is true of features. Class logits on a region stay float16 beside the 8 bits of the
    dense ones, which would cost RM 4e-3 of its loss.
    """
    asked = set(needs)
    return tuple(
        sorted(
            n for n in asked
            if n.at_entries and Need(n.name, Region.ALL) in asked
            and (encoding in ("float16", "lossless") or n.name == FEATURES or n.name in BACKBONE)
        )
    )  # fmt: skip


def _default_encoding(need: Need, bits: int) -> Encoding:
    if need.name == BOX_DISTRIBUTION:
        return encodings.VectorAffine(bits)
    if need.name == FEATURES or need.name in BACKBONE:
        # a region has no levels to share a range over: each cell has its own
        return encodings.ChannelAffine(bits) if need.dense else encodings.VectorAffine(bits)
    if need.name == CLS_LOGITS and need.dense:
        return encodings.LogOdds8()
    if need.name in (BOXES, PROPOSAL_BOXES):
        return encodings.Box16() if need.dense else encodings.FLOAT32
    return encodings.FLOAT16  # class logits on main and ranks: a prototype lost 4e-3 of RM to 8 bits, 5e-5 to these


def shard_rows_for(row_bytes: int) -> int:
    """Rows per shard so that one shard's raw bytes stay under SHARD_BYTES."""
    return max(1, min(MAX_SHARD_ROWS, SHARD_BYTES // row_bytes))
