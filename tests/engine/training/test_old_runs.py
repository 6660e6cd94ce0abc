"""What options of an earlier edition of the rules become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.detectors.base import Detector
from kdcli.detectors.build import ModelSpec, build_detector
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training import launch
from kdcli.engine.training.old_runs import refuse_resume, to_today
from kdcli.engine.training.run_folder import read_config, read_fields
from kdcli.errors import MissingPathError, OptionError
from kdcli.methods import METHODS
from kdcli.options import RULES, TrainOptions, build
from tests.support.small_runs import run_request


class Listening(NullReporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def student(detector: str = "retinanet", classes: int = 8) -> Detector:
    return build_detector(ModelSpec(detector, "shufflenet_v2_x0_5", classes, fpn_channels=32, tower_convs=1))


def options(rules: int = 1, detector: str = "retinanet", **fields: Any) -> TrainOptions:
    model = {"name": f"{detector}_shufflenet_v2_x0_5", "bn": fields.pop("bn", "train")}
    command = "distill" if "method" in fields else "train"
    return build(TrainOptions, {"command": command, "model": model, "rules": rules, **fields})


def test_todays_options_stay_as_they_are() -> None:
    heard = Listening()
    given = options(RULES, method="pfi", methods={"pfi": {"weight": 1.5}}, bn="frozen", backbone_weights="imagenet")
    assert to_today(given, student(), heard) is given
    assert heard.messages == []


def loss(weight: float, form: str, p_dif: Tensor, f_dif: Tensor) -> Tensor:
    """PFI of one level by hand: p_dif [cells], f_dif [cells]."""
    product = p_dif * f_dif
    value = {
        "squared": product.square().mean(),
        "linear": product.mean(),
        "norm": product.square().sum().sqrt() / len(product),
    }
    return weight * value[form]


@pytest.mark.parametrize(("form", "power"), [("squared", 2), ("linear", 1), ("norm", 1)])
@pytest.mark.parametrize(("detector", "outputs"), [("retinanet", 72), ("gfl", 8)])
def test_pfis_weight_is_for_the_same_loss(form: str, power: int, detector: str, outputs: int) -> None:
    """The mean over a cell's A*K outputs of the squared differences was read, and their sum is now."""
    table = {"weight": 1.5, "form": form, "pred_space": "prob", "detach_pdif": False}
    heard = Listening()
    found = to_today(options(detector=detector, method="pfi", methods={"pfi": table}), student(detector), heard)
    weight = found.methods["pfi"]["weight"]
    assert weight == pytest.approx(1.5 / outputs**power)
    assert found.methods["pfi"] == {**table, "weight": weight}
    assert found.rules == RULES
    (said,) = heard.messages
    assert said.startswith("pfi.weight = 1.5 stays the same loss: it was for the mean over a cell's")
    torch.manual_seed(0)
    differences, f_dif = torch.rand(20, outputs, dtype=torch.float64).square(), torch.rand(20, dtype=torch.float64)
    before = loss(1.5, form, differences.mean(dim=1), f_dif)
    torch.testing.assert_close(loss(weight, form, differences.sum(dim=1), f_dif), before)


def test_frozen_is_said_where_it_was_the_default() -> None:
    for weights, bn, expected in (("imagenet", "frozen", 1), ("none", "frozen", 0), ("imagenet", "train", 0)):
        heard = Listening()
        found = to_today(options(bn=bn, backbone_weights=weights), student(), heard)
        assert found.model.bn == bn
        assert len(heard.messages) == expected


def test_weights_that_were_defaults_stay_and_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS["bckd"], "defaults", {"retinanet": {"cls_weight": 1.0, "loc_weight": 2.5}})
    table = {"cls_weight": 1.0, "loc_weight": 4.0}
    heard = Listening()
    found = to_today(options(method="bckd", methods={"bckd": table}), student(), heard)
    assert found.methods["bckd"] == table
    assert heard.messages == ["bckd.loc_weight = 4 stays; today's default here is 2.5"]


@pytest.mark.parametrize(
    ("detector", "method", "reason"),
    [
        ("faster_rcnn", "pkd, fgd", r"fgd on Faster R-CNN changed \(four levels, it was five"),
        ("tv_faster_rcnn", "fgd", "fgd on Faster R-CNN changed"),
        ("mm_faster_rcnn", "defeat", r"mm_faster_rcnn's training became mmdet's"),
        ("mm_faster_rcnn", "", r"mm_faster_rcnn's training became mmdet's"),
        ("faster_rcnn", "defeat", None),
        ("faster_rcnn", "./mine.py:FGD", None),
        ("retinanet", "fgd", None),
    ],
)
def test_what_cannot_go_on_is_refused(detector: str, method: str, reason: str | None) -> None:
    fields = {"method": method} if method else {}
    refuse_resume(Path("runs/now"), options(RULES, detector, **fields))
    old = options(1, detector, **fields)
    if reason is None:
        refuse_resume(Path("runs/old"), old)
        return
    with pytest.raises(OptionError, match=rf"--resume runs/old: {reason}.* since this run began.*; start a new run"):
        refuse_resume(Path("runs/old"), old)
    heard = Listening()
    assert to_today(old, student("gfl"), heard).rules == RULES  # a new run from its config.toml is one of today
    assert any("the new run trains under today's rules" in m for m in heard.messages)


def test_a_queue_says_when_its_seeds_differ(shapes: Path, tmp_path: Path) -> None:
    fields = run_request("train", shapes, epochs=1)
    launch.queue(fields, [0], tmp_path, NullReporter(), overwrite=False)
    config = tmp_path / "seed-0" / "config.toml"
    for edition, expected in (("rules = 2", 0), ("", 1)):
        config.write_text(config.read_text().replace("rules = 2", edition))
        heard = Listening()
        seed = 1 + expected
        launch.queue(fields, [0, seed], tmp_path, heard, overwrite=False)
        said = [m for m in heard.messages if "began under earlier ones" in m]
        assert len(said) == expected
        assert read_config(tmp_path / f"seed-{seed}").rules == RULES


def test_which_edition_a_file_is_of(tmp_path: Path) -> None:
    """A run's config.toml without the field is of the first; a recipe by hand is of today's."""
    recipe, folder = tmp_path / "recipe.toml", tmp_path / "run"
    folder.mkdir()
    recipe.write_text("epochs = 4\n")
    (folder / "config.toml").write_text("epochs = 4\n")
    assert read_fields(recipe) == read_fields(folder / "config.toml") == {"epochs": 4}
    (folder / "env.json").write_text("{}")
    assert read_fields(folder / "config.toml") == {"rules": 1, "epochs": 4}
    assert read_config(folder).rules == 1
    (folder / "config.toml").write_text("rules = 2\n")
    assert read_config(folder).rules == read_fields(folder / "config.toml")["rules"] == 2
    with pytest.raises(OptionError, match=r"rules = 3: must be from 1 to 2; a newer kdcli wrote more"):
        build(TrainOptions, {"rules": 3})
    with pytest.raises(MissingPathError):
        read_fields(tmp_path / "gone.toml")
