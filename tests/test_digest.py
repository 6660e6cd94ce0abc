"""The digest over a file's content: what it sees, and what it does not take."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from kdcli.digest import DIGEST, digest_of, is_intact, sealed

CONTENT: dict[str, Any] = {"a": 1, "b": [1.5, None, "x"], "t": torch.arange(6.0).reshape(2, 3), 3: True}


def test_every_value_counts() -> None:
    plain = {"a": 1, "b": [1.5, None, "x"], "t": torch.arange(6.0).reshape(2, 3)}
    others = [
        {**plain, "a": 2},
        {**plain, "a": 1.0},
        {**plain, "a": True},
        {**plain, "b": [1.5, "x", None]},
        {**plain, "c": None},
        {k: v for k, v in plain.items() if k != "b"},
        {**plain, "t": torch.arange(6.0)},
        {**plain, "t": torch.arange(6.0).reshape(2, 3).double()},
        {**plain, "t": torch.tensor([[0.0, 1, 2], [3, 4, 5.0000005]])},
    ]
    assert len({digest_of(value) for value in (plain, *others)}) == 1 + len(others)


def test_order_and_memory_layout_do_not_count() -> None:
    image = torch.rand(1, 3, 4, 4)
    assert digest_of({"a": 1, "t": image}) == digest_of(
        {"t": image.to(memory_format=torch.channels_last), "a": 1},
    )
    assert digest_of({"t": torch.ones(3, dtype=torch.bfloat16)}) != digest_of({"t": torch.ones(3).half()})


def test_a_trip_through_json_keeps_it() -> None:
    made = sealed({"ap": 41.37000000000001, "null": None, "names": {"ü": 1}, "list": [1, 2.5]})
    assert is_intact(json.loads(json.dumps(made)))
    assert is_intact({"ap": 1})  # from before there was one
    assert not is_intact({**made, "ap": 41.37})
    assert not is_intact({**made, DIGEST: 7})


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1).expand(10**12),
        torch.zeros(3).to_sparse(),
        torch.zeros(3, device="meta"),
        b"bytes",
        {1: 0, "a": 0},
    ],
    ids=["expanded", "sparse", "meta", "bytes", "keys"],
)
def test_what_no_writer_puts_there_is_not_intact(value: object) -> None:
    assert not is_intact({"value": value, DIGEST: "0"})
    with pytest.raises((TypeError, ValueError)):
        digest_of(value)
