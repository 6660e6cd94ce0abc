"""Encodings keep within the error they state, for any values that a network may give."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from kdcli.errors import StoreError
from kdcli.store import encodings
from kdcli.store.encodings import ChannelAffine, Encoding, Float, LogOdds8, VectorAffine, from_json

ALL: list[Encoding] = [
    Float("float32"),
    Float("float16"),
    LogOdds8(),
    LogOdds8(-4.0, 4.5),
    VectorAffine(),
    VectorAffine(5),
    ChannelAffine(),
    ChannelAffine(4),
]
CHECKED = settings(deadline=None, max_examples=80)
EPS = 2.0**-23  # of a float32
SIZES = (5, 3, 1, 0)

Rows = NDArray[np.float32]


def numbers(limit: float) -> st.SearchStrategy[float]:
    # a processor may flush subnormal numbers to 0; no logit is that small
    return st.floats(-limit, limit, width=32, allow_subnormal=False)


def arrays(shape: st.SearchStrategy[tuple[int, ...]] | tuple[int, ...], limit: float = 1000) -> st.SearchStrategy[Rows]:
    return hnp.arrays(np.float32, shape, elements=numbers(limit))


def round_trip(encoding: Encoding, value: Rows, valid: NDArray[np.bool_] | None = None, sizes: Any = SIZES) -> Rows:
    """Encode one row, check the arrays against the layout, and decode it as a batch of one."""
    codes = encoding.encode(value, valid, sizes)
    layout = encoding.layout(len(value), value.shape[1:], sizes)
    assert {k: (v.shape, v.dtype.name) for k, v in codes.items()} == layout
    batch = {k: torch.from_numpy(v)[None] for k, v in codes.items()}
    decoded = encoding.decode(batch, sizes)[0]
    assert decoded.dtype == torch.float32
    return decoded.numpy()


@CHECKED
@given(arrays((9, 4), limit=2.0**100))
def test_float32_is_lossless(value: Rows) -> None:
    np.testing.assert_array_equal(round_trip(Float("float32"), value), value, strict=True)


@CHECKED
@given(arrays((9, 4), limit=6e4))
def test_float16_rounds_to_the_nearest(value: Rows) -> None:
    # half a unit in the last of 11 bits; below 2^-14 the unit stays 2^-24
    error = np.abs(round_trip(Float("float16"), value) - value)
    assert (error <= np.maximum(np.abs(value) * 2.0**-11, 2.0**-25)).all()


@CHECKED
@given(arrays((9, 6), limit=40), st.sampled_from([LogOdds8(), LogOdds8(-4.0, 4.5)]))
def test_log_odds_half_a_step_inside_and_clipped_outside(value: Rows, encoding: LogOdds8) -> None:
    decoded = round_trip(encoding, value)
    half = (encoding.high - encoding.low) / 255 / 2
    clipped = np.clip(value, encoding.low, encoding.high)
    assert (np.abs(decoded - clipped) <= half + 16 * EPS).all()
    assert decoded.min(initial=0) >= encoding.low - 16 * EPS
    assert decoded.max(initial=0) <= encoding.high + 16 * EPS


def test_log_odds_are_in_logit_space() -> None:
    assert LogOdds8() == LogOdds8(-12.0, 8.0)
    ends = np.array([[-100.0, -12.0, 8.0, 100.0]], np.float32)
    np.testing.assert_array_equal(LogOdds8().encode(ends, None, (1,))[""], [[0, 0, 255, 255]])


@pytest.mark.parametrize("bits", [8, 6, 4])
@CHECKED
@given(value=arrays(st.tuples(st.integers(0, 6), st.just(4), st.integers(1, 17))))
def test_edge_affine_half_a_step_of_each_edge(bits: int, value: Rows) -> None:
    steps = 2**bits - 1
    codes = VectorAffine(bits).encode(value, None, SIZES)
    assert codes[""].max(initial=0) <= steps
    decoded = round_trip(VectorAffine(bits), value)
    scale, offset = np.moveaxis(codes["affine"].astype(np.float32), -1, 0)[..., None]
    slack = 4 * EPS * (np.abs(offset) + steps * scale)  # of the float32 arithmetic of decoding
    assert (np.abs(decoded - value) <= scale / 2 + slack + 1e-37).all()  # a step under the smallest float32 is 0
    # the float16 pair costs little: steps are those of the edge's range, plus what the rounding of the offset adds
    spread = np.ptp(value, axis=-1, keepdims=True)
    assert (scale * steps <= (spread + 2.0**-9 * np.abs(value).max(-1, keepdims=True)) * 1.002 + steps * 2.0**-23).all()


@pytest.mark.parametrize("bits", [8, 6, 4])
@CHECKED
@given(value=arrays((9, 3)), valid=hnp.arrays(np.bool_, 9))
def test_channel_affine_half_a_step_of_each_level_and_channel(bits: int, value: Rows, valid: NDArray[np.bool_]) -> None:
    decoded = round_trip(ChannelAffine(bits), value, valid)
    start = 0
    for size in SIZES:
        part = slice(start, start + size)
        start += size
        inside = value[part][valid[part]]
        if not len(inside):
            continue
        half = np.ptp(inside.astype(np.float64), axis=0) / (2**bits - 1) / 2
        slack = 4 * EPS * np.abs(inside).max(axis=0) + 1e-37  # float32 arithmetic and its smallest steps
        assert (np.abs(decoded[part][valid[part]] - inside) <= half + slack).all()


@pytest.mark.parametrize("encoding", ALL, ids=repr)
@CHECKED
@given(value=arrays((9, 4, 3), limit=7), valid=hnp.arrays(np.bool_, 9))
def test_invalid_rows_are_code_0_and_touch_nothing(encoding: Encoding, value: Rows, valid: NDArray[np.bool_]) -> None:
    codes = encoding.encode(value, valid, SIZES)
    assert not codes[""][~valid].any()
    if isinstance(encoding, VectorAffine):
        assert not codes["affine"][~valid].any()
    other = np.where(valid[:, None, None], value, np.float32(-5000))
    for suffix, code in encoding.encode(other, valid, SIZES).items():
        np.testing.assert_array_equal(code, codes[suffix])
    all_valid = encoding.encode(value, np.ones(9, bool), SIZES)
    for suffix, code in encoding.encode(value, None, SIZES).items():
        np.testing.assert_array_equal(code, all_valid[suffix])


@pytest.mark.parametrize("encoding", ALL, ids=repr)
@pytest.mark.parametrize("constant", [0.0, 1.0, -3.25, 4.1, 1e-6])
def test_a_constant_vector(encoding: Encoding, constant: float) -> None:
    value = np.full((9, 4, 17), constant, np.float32)
    error = np.abs(round_trip(encoding, value) - value).max()
    if isinstance(encoding, ChannelAffine) or encoding == Float("float32"):
        assert error == 0  # scale 0, every code 0, the offset exact
    elif isinstance(encoding, VectorAffine):
        # what the float16 offset misses is spanned by the steps: at most half of one of 2^-10 * |constant| / steps
        assert error <= 2.0**-10 * abs(constant) / encoding.steps + 2.0**-25
    elif isinstance(encoding, LogOdds8):
        assert error <= (encoding.high - encoding.low) / 510 + 1e-6
    else:
        assert error <= 2.0**-11 * abs(constant) + 2.0**-25


@pytest.mark.parametrize("encoding", ALL, ids=repr)
def test_empty_arrays(encoding: Encoding) -> None:
    empty = np.zeros((0, 4, 17), np.float32)
    assert round_trip(encoding, empty, sizes=(0,)).shape == (0, 4, 17)
    assert round_trip(encoding, empty, np.zeros(0, bool), sizes=(0,)).shape == (0, 4, 17)


def test_batches_decode_as_single_rows() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(9, 3)).astype(np.float32) for _ in range(3)]
    for encoding in ALL:
        codes = [encoding.encode(r, None, SIZES) for r in rows]
        batch = {k: torch.from_numpy(np.stack([c[k] for c in codes])) for k in codes[0]}
        together = encoding.decode(batch, SIZES).numpy()
        for k, row in enumerate(rows):
            np.testing.assert_array_equal(together[k], round_trip(encoding, row))


def test_a_softmax_does_not_see_a_coarse_offset() -> None:
    # logits far from 0: float16 offsets are 4 apart there, and all bins share the offset
    value = np.linspace(5000, 5012, 17, dtype=np.float32).reshape(1, 1, 17).repeat(4, 1)
    decoded = round_trip(VectorAffine(), value)
    ours, exact = (torch.softmax(torch.from_numpy(v), -1) for v in (decoded, value))
    assert float((ours - exact).abs().max()) < 0.02


@pytest.mark.parametrize("encoding", ALL, ids=repr)
def test_json_round_trip(encoding: Encoding) -> None:
    text = json.dumps(encoding.to_json())
    assert from_json(json.loads(text)) == encoding
    assert isinstance(json.loads(text)["name"], str)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"name": "zip"},
        {"name": None},
        {"name": "float64"},
        {"name": "log_odds_8"},
        {"name": "vector_affine_9"},
        {"name": "channel_affine_3"},
        {"name": "log_odds_8", "low": "a", "high": 8.0},
        {"low": 1.0, "high": 2.0},
    ],
)
def test_an_unknown_encoding_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match=r"unknown encoding .*newer kdcli"):
        from_json(data)


def test_the_two_constants() -> None:
    assert Float("float32") == encodings.FLOAT32
    assert Float("float16") == encodings.FLOAT16
