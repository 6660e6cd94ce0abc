"""Which methods there are, which options they take, and which pairs of networks they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.errors import MissingPathError, OptionError
from kdcli.geometry.regions import RegionSpec
from kdcli.methods import METHODS
from kdcli.methods.base import Pair, method_options
from kdcli.methods.ld import LD
from kdcli.methods.pfi import PFI
from kdcli.methods.resolve import check_pair, find_methods, name_methods, resolve_options
from kdcli.methods.rm import RM
from tests.support.method_case import TWO, detector_of, inputs, make_batch, make_outputs, pair_of

MINE = '''
"""A user's method."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcli.methods.base import Method, Pair
from kdcli.structures import Batch
from kdcli.tensors import CLS_LOGITS, Need, Tensors

CLASSES = Need(CLS_LOGITS, "main")


class Mine(Method):
    """Squared difference of logits."""

    title = "none"
    needs = (CLASSES,)
    defaults = {"retinanet": {"weight": 7.0}}

    def __init__(self, pair: Pair, *, weight: float = 2.0, power: int | None = None, untyped=1) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, student: Tensors, teacher: Tensors, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.weight * (student[CLASSES.key] - teacher[CLASSES.key]).square().sum()}


class NotAMethod:
    pass


number = 5
'''


def test_a_list_of_methods() -> None:
    assert find_methods("ld") == {"ld": LD}
    assert list(find_methods(" pfi , rm,ld ").items()) == [("pfi", PFI), ("rm", RM), ("ld", LD)]
    assert find_methods(",".join(METHODS)) == METHODS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pif", "unknown method 'pif'; did you mean 'pfi'?"),
        ("LD", "unknown method 'LD'; choose from {ALL}"),
        ("", "unknown method ''; choose from {ALL}"),
        ("ld,", "unknown method ''; choose from {ALL}"),
        ("ld,pfi,ld", "method 'ld' is named twice in 'ld,pfi,ld'"),
    ],
)
def test_an_unknown_method(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        find_methods(text)
    message = message.replace("{ALL}", ", ".join(sorted(METHODS)))
    assert str(caught.value) == message
    assert caught.value.exit_code == 3


def test_a_users_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    name_methods("ld,./mine.py:Mine")
    found = find_methods("ld,./mine.py:Mine")
    assert find_methods("ld,:Mine") == found  # as a store has it
    assert list(found) == ["ld", "mine"]
    mine = found["mine"]
    options = resolve_options("mine", mine, "gfl", {"weight": 3})
    assert options == {"weight": 3.0, "power": None, "untyped": 1}
    assert resolve_options("mine", mine, "retinanet", {})["weight"] == 7.0
    assert resolve_options("mine", mine, "retinanet", {"weight": 1.5})["weight"] == 1.5
    with pytest.raises(OptionError, match=r"unknown option 'mine\.wieght'; did you mean 'weight'\?"):
        resolve_options("mine", mine, "gfl", {"wieght": 1})
    with pytest.raises(OptionError, match=r"option 'mine\.untyped' of Mine.__init__ has no type hint"):
        resolve_options("mine", mine, "gfl", {"untyped": 1})

    gfl = detector_of("gfl")
    check_pair("mine", mine, options, pair_of(gfl, gfl), "gfl_a", "gfl_b")
    batch = make_batch(gfl, [TWO])
    ours, theirs = (inputs(gfl, make_outputs(gfl, 1, s), mine.needs, batch) for s in (1, 2))
    method = mine(pair_of(gfl, gfl), **options)
    terms = method(ours, theirs, batch)
    assert torch.isfinite(terms["loss"])
    assert method.active(batch, "loss")


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        ("none.py:Mine", MissingPathError, "method file 'none.py' does not exist; name a Python file"),
        ("mine.txt:Mine", OptionError, "method file 'mine.txt' is not a .py file"),
        ("mine.py:Other", OptionError, "has no class Other derived from"),
        ("mine.py:NotAMethod", OptionError, "has no class NotAMethod derived from"),
        ("mine.py:number", OptionError, "has no class number derived from"),
        ("mine.py:", OptionError, "derived from"),
        ("mine.py:Mine,./mine.py:Mine", OptionError, "named twice"),
    ],
)
def test_a_users_method_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, error: type[Exception], message: str
) -> None:
    for name in ("mine.py", "mine.txt"):
        (tmp_path / name).write_text(MINE)
    monkeypatch.chdir(tmp_path)
    name_methods(part)
    with pytest.raises(error, match=message) as caught:
        find_methods(part)
    assert caught.value.exit_code == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", METHODS)
def test_defaults_resolve_to_themselves(name: str) -> None:
    method = METHODS[name]
    resolved = resolve_options(name, method, "gfl", {})
    assert resolved == {n: p.default for n, p in method_options(method).items()}
    given = {n: v for n, v in resolved.items() if v is not None}  # as config.toml holds them
    assert resolve_options(name, method, "gfl", given) == resolved
    method(pair_of(detector_of("gfl"), detector_of("gfl")), **resolved)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("ld", {"temprature": 8}, "unknown option 'ld.temprature'; did you mean 'temperature'?"),
        ("ld", {"vlrweight": "iou"}, "unknown option 'ld.vlrweight'; did you mean 'vlr_weight'?"),
        ("rm", {"zzz": 1}, "unknown option 'rm.zzz'; choose from cls, loc, sorted_scores, temperature, weight"),
        ("ld", {"weight": "much"}, "ld.weight = 'much': must be a number"),
        ("ld", {"weight": True}, "ld.weight = True: must be a number"),
        ("ld", {"weight": [1.0]}, "ld.weight = [1.0]: must be a number"),
        ("ld", {"vlr_weight": "ious"}, "ld.vlr_weight = 'ious'; did you mean 'iou'?"),
        ("ld", {"vlr_metric": 3}, "ld.vlr_metric = 3; choose from diou, inside, official"),
        ("ld", {"vlr_alpha": "high"}, "ld.vlr_alpha = 'high': must be a number"),
        ("rm", {"sorted_scores": 1}, "rm.sorted_scores = 1: must be true or false"),
        ("pfi", {"form": "square"}, "pfi.form = 'square'; did you mean 'squared'?"),
    ],
)
def test_a_wrong_option(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        resolve_options(name, METHODS[name], "gfl", given)
    assert str(caught.value) == message
    assert caught.value.exit_code == 3


def test_options_take_their_type() -> None:
    resolved = resolve_options("ld", LD, "gfl", {"temperature": 8, "vlr_alpha": "none", "vlr_weight": "mask"})
    assert resolved["temperature"] == 8.0
    assert isinstance(resolved["temperature"], float)
    assert resolved["vlr_alpha"] is None
    assert resolve_options("ld", LD, "gfl", {"vlr_alpha": 0.5})["vlr_alpha"] == 0.5


def checked(name: str, pair: Pair, student: str, teacher: str) -> None:
    """``check_pair`` with the method's default options."""
    check_pair(name, METHODS[name], resolve_options(name, METHODS[name], "gfl", {}), pair, student, teacher)


def test_ld_needs_a_distribution() -> None:
    retina, gfl = detector_of("retinanet"), detector_of("gfl")
    for student, teacher, side in ((retina, gfl, "student"), (gfl, retina, "teacher"), (retina, retina, "student")):
        with pytest.raises(OptionError, match=f"needs box_distribution, which the {side} .* does not give") as caught:
            checked("ld", pair_of(student, teacher), "first_model", "second_model")
        assert caught.value.exit_code == 3
        assert "kdcli methods" in str(caught.value)
        assert ("first_model" if side == "student" else "second_model") in str(caught.value)


@pytest.mark.parametrize("name", ["ld", "rm", "pfi", "bckd"])
def test_other_classes_are_refused(name: str) -> None:
    pair = pair_of(detector_of("gfl"), detector_of("gfl", classes=4))
    with pytest.raises(OptionError, match=r"student a has \[3\], teacher b has \[4\]; they must agree"):
        checked(name, pair, "a", "b")


def test_other_bins_matter_to_ld_alone() -> None:
    pair = pair_of(detector_of("gfl"), detector_of("gfl", reg_max=12))
    with pytest.raises(OptionError, match=r"compares box_distribution .* has \[4, 9\], teacher b has \[4, 13\]"):
        checked("ld", pair, "a", "b")
    for name in ("rm", "pfi"):
        checked(name, pair, "a", "b")


@pytest.mark.parametrize("name", METHODS)
def test_other_channels_are_fine(name: str) -> None:
    checked(name, pair_of(detector_of("gfl"), detector_of("gfl", 64)), "a", "b")


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("rm", {"temperature": 0}, r"rm\.temperature = 0\.0: must be above 0"),
        ("drkd", {"batch_ref": -1}, r"drkd\.batch_ref = -1\.0: must be above 0"),
        ("ld", {"weight": -1}, r"ld\.weight = -1\.0: must not be negative"),
        ("pfi", {"weight": "nan"}, r"pfi\.weight = 'nan': must be a number"),
        ("pfi", {"weight": float("inf")}, r"pfi\.weight = inf: must be a finite number"),
        ("pfi", {"weight": 0}, "method 'pfi' has no term"),
    ],
)
def test_numbers_that_no_loss_can_use(name: str, given: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        resolve_options(name, METHODS[name], "gfl", given)


def test_region_options_start_from_the_detectors_own() -> None:
    own = RegionSpec(vlr_metric="inside", vlr_gamma=0.5)
    resolved = resolve_options("ld", LD, ("mine", "fcos"), {"vlr_gamma": 0.3}, own)
    assert (resolved["vlr_metric"], resolved["vlr_gamma"], resolved["vlr_weight"]) == ("inside", 0.3, "score")
