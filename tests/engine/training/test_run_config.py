"""From what the user asked for to the options of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training.run_config import from_flags, resolved_fields
from kdcli.engine.training.setup import prepare
from kdcli.errors import OptionError
from kdcli.options import TrainOptions, to_plain
from tests.support.small_runs import run_request


@pytest.mark.parametrize("field", [{"method": "ld"}, {"cache": "store"}, {"teacher": "run"}])
def test_plain_training_refuses_what_it_would_not_read(field: dict[str, str]) -> None:
    plain = {"data": "data", "model": {"name": "gfl_resnet18"}}
    assert from_flags("train", plain, {}, None, {}).options().method == ""
    with pytest.raises(OptionError, match=rf"train reads no {next(iter(field))}: .* use distill"):
        from_flags("train", {**plain, **field}, {}, None, {}).options()


def prepared(shapes: Path, detector: str, optim: dict[str, Any]) -> TrainOptions:
    model = {"name": f"{detector}_shufflenet_v2_x0_5", "fpn_channels": 16, "tower_convs": 1, "head_channels": 32}
    request = run_request("train", shapes, model=model)
    request = from_flags("train", {**request.fields, "optim": optim}, {}, None, {})
    return prepare(request.options(), frozenset(request.fields), NullReporter()).options


@pytest.mark.parametrize(("detector", "lr"), [("mm_faster_rcnn", 0.02), ("faster_rcnn", 0.01), ("gfl", 0.01)])
def test_a_learning_rate_left_out_is_the_detectors_own(detector: str, lr: float, shapes: Path) -> None:
    for given in ({}, {"lr": "none"}):
        options = prepared(shapes, detector, given)
        assert to_plain(options)["optim"]["lr"] == lr  # config.toml has the number
        for again in given, {"lr": lr}:  # the same flags beside --resume change nothing
            assert resolved_fields({"optim": again}, options)["optim"] == dict.fromkeys(again, lr)
    assert prepared(shapes, detector, {"lr": 0.003}).optim.lr == 0.003
