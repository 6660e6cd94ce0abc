"""A digest of everything in a file, kept in the file, so that it is replaced with it in one rename.

PyTorch and JSON read a flipped bit as data: the digest tells. It is over values, not over bytes of the file: what it accepts
is what was written. A file from before digests has none and is read without.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

DIGEST = "digest"


def digest_of(value: object) -> str:
    """Hex sha256 of plain values (as JSON spells them, keys in order of the alphabet) and of tensors (dtype, shape, bytes).

    Raises TypeError or ValueError for what is neither, and for a tensor that claims more than it holds.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_tensor).encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` with its digest."""
    return {**content, DIGEST: digest_of(content)}


def is_intact(content: Mapping[str, Any]) -> bool:
    """False when ``content`` has a digest and is not what it was made of."""
    if DIGEST not in content:
        return True
    try:
        written = digest_of({key: value for key, value in content.items() if key != DIGEST})
    except (TypeError, ValueError, RecursionError):  # holds what no writer of ours puts there
        return False
    return type(content[DIGEST]) is str and content[DIGEST] == written


def _tensor(value: object) -> dict[str, Any]:
    import torch  # here, so that kdcli compare starts without it

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type == "meta":
        raise TypeError(f"no plain value: {type(value).__name__}")
    value = value.detach()
    if value.is_quantized or value.nbytes > value.untyped_storage().nbytes():  # e.g. one number, expanded to 10^12
        raise ValueError("a tensor that claims more than it holds")
    flat = value.cpu().contiguous().reshape(-1)
    content = flat.resolve_conj().resolve_neg().view(torch.uint8).numpy()
    return {
        "dtype": str(value.dtype),
        "shape": list(value.shape),
        "sha256": hashlib.sha256(content.data).hexdigest(),
    }
