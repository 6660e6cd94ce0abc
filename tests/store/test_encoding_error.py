"""The measured error of a store equals what numpy finds over all its values at once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kdcli.store.encoding_error import ErrorMeter, summarise

RNG = np.random.default_rng(0)
EXACT = [RNG.normal(-3, 2, (n, 4)).astype(np.float32) for n in (7, 1, 0, 30, 12)]
DECODED = [e + RNG.normal(0, 0.01, e.shape).astype(np.float32) for e in EXACT]


def meter(rows: slice) -> ErrorMeter:
    found = ErrorMeter()
    for exact, decoded in zip(EXACT[rows], DECODED[rows], strict=True):
        found.add("cls_logits@main", exact, decoded)
    return found


def test_rms_and_worst_are_numpys() -> None:
    (summary,) = summarise([meter(slice(None)).sums]).values()
    difference = np.concatenate(DECODED).astype(np.float64) - np.concatenate(EXACT)
    assert summary["rms"] == pytest.approx(float(np.sqrt(np.mean(difference**2))), rel=1e-7)
    assert summary["worst"] == pytest.approx(float(np.abs(difference).max()), rel=1e-9)


def test_relative_is_to_the_deviation_within_rows() -> None:
    (summary,) = summarise([meter(slice(None)).sums]).values()
    squares = sum(float(((d.astype(np.float64) - e) ** 2).sum()) for d, e in zip(DECODED, EXACT, strict=True))
    around = sum(float(((e.astype(np.float64) - e.mean(dtype=np.float64)) ** 2).sum()) for e in EXACT if e.size)
    assert summary["relative"] == pytest.approx(np.sqrt(squares / around), rel=1e-6)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_large_rows_far_from_zero(mean: float) -> None:
    exact = RNG.normal(mean, 0.5, (1705, 33)).astype(np.float32)  # no whole number of blocks
    decoded = (exact + RNG.normal(0, 0.01, exact.shape)).astype(np.float32)
    found = ErrorMeter()  # sums in float32: how exact they are differs with the processor's vectors
    found.add("features@all", exact, decoded)
    (summary,) = summarise([found.sums]).values()
    difference = decoded.astype(np.float64) - exact
    assert summary["rms"] == pytest.approx(float(np.sqrt(np.mean(difference**2))), rel=1e-5)
    assert summary["relative"] == pytest.approx(summary["rms"] / float(exact.std(dtype=np.float64)), rel=1e-5)
    assert summary["worst"] == pytest.approx(float(np.abs(difference).max()), rel=1e-5)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_rows_that_do_not_count(mean: float) -> None:
    exact = RNG.normal(mean, 0.5, (1705, 33)).astype(np.float32)
    decoded = (exact + RNG.normal(0, 0.01, exact.shape)).astype(np.float32)
    keep = RNG.random(len(exact)) < 0.7
    exact[~keep] += 50
    decoded[~keep] = 0
    found, alone = ErrorMeter(), ErrorMeter()
    found.add("features@all", exact, decoded, keep)
    alone.add("features@all", exact[keep], decoded[keep])
    for name, value in alone.sums["features@all"].items():
        assert found.sums["features@all"][name] == pytest.approx(value, rel=1e-4)
    found.add("features@all", exact, decoded, np.zeros(len(exact), bool))
    assert found.sums["features@all"]["count"] == 33 * keep.sum()


def test_parts_add_up_and_survive_json() -> None:
    whole = summarise([meter(slice(None)).sums])
    parts = [json.loads(json.dumps(meter(part).sums)) for part in (slice(0, 2), slice(2, 3), slice(3, None))]
    joined = summarise(parts)
    assert joined.keys() == whole.keys()
    for key, value in whole["cls_logits@main"].items():
        assert joined["cls_logits@main"][key] == pytest.approx(value, rel=1e-12)


def test_a_lossless_tensor_has_no_error() -> None:
    found = ErrorMeter()
    found.add("a", EXACT[0], EXACT[0])
    found.add("b", np.full((3, 2), 2.5, np.float32), np.full((3, 2), 2.5, np.float32))
    summary = summarise([found.sums])
    assert summary["a"] == {"rms": 0.0, "relative": 0.0, "worst": 0.0}
    assert summary["b"] == {"rms": 0.0, "relative": 0.0, "worst": 0.0}


def test_empty_rows_add_nothing() -> None:
    found = ErrorMeter()
    found.add("a", EXACT[2], DECODED[2])
    assert found.sums == {}
    assert summarise([found.sums]) == {}
    assert summarise([]) == {}


def test_several_tensors_are_kept_apart() -> None:
    found = ErrorMeter()
    found.add("a", EXACT[0], EXACT[0] + np.float32(1))
    found.add("b", EXACT[0], EXACT[0] - np.float32(2))
    summary = summarise([found.sums, found.sums])
    assert summary["a"]["worst"] == pytest.approx(1, rel=1e-5)
    assert summary["b"]["rms"] == pytest.approx(2, rel=1e-5)
