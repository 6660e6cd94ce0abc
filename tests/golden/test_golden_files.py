"""Every reference file of the golden folder (``--golden DIR``), checked by its kind; an unknown kind fails by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.golden.case import Arrays, Case, load
from tests.support.golden.checks import CHECKS
from tests.support.golden.whole import check, kind_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each file; a folder without files is one failing test, not none. Inputs are no cases."""
    if "golden_file" in metafunc.fixturenames:
        folder = metafunc.config.getoption("golden")
        files = sorted(p for p in folder.glob("*.npz") if p.stem != "batches" and not p.stem.startswith("inputs_"))
        files = files or [folder / "no files here"]
        metafunc.parametrize("golden_file", files, ids=[f.stem for f in files])


def test_file(golden_file: Path) -> None:
    try:
        kind, rest = kind_of(golden_file.stem)
    except KeyError:
        pytest.fail(f"{golden_file.name}: no check for this kind of file; known kinds: {', '.join(CHECKS)}")
    check(kind, Case(golden_file.parent, golden_file.stem, rest, Arrays(load(golden_file))))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gfl_A", ("gfl", "A")),
        ("gfl_Q7_lowscore", ("gfl", "Q7")),
        ("gfl_predict", ("gfl_predict", "")),
        ("gfl_predict_lowscore", ("gfl_predict", "")),
        ("atss_assign", ("atss_assign", "")),
        ("atss_A", ("atss", "A")),
        ("fcosplus_A", ("fcosplus", "A")),
        ("bckd_head_C", ("bckd_head", "C")),
        ("bckd_loc", ("bckd_loc", "")),
        ("defeat_neck_s8", ("defeat_neck", "s8")),
        ("defeat_neck_inputs", ("defeat_neck_inputs", "")),
        ("ld_mmdet3_C", ("ld_mmdet3", "C")),
        ("ld_repo_B_finegrained", ("ld_repo", "B_finegrained")),
        ("ld_repo_C_gibox_lowscore", ("ld_repo", "C_gibox")),
        ("vlr_im_region_R", ("vlr_im_region", "R")),
    ],
)
def test_kind_of(name: str, expected: tuple[str, str]) -> None:
    assert kind_of(name) == expected


@pytest.mark.parametrize("name", ["gflv2_A", "mystery", "ldx_A", "ld_other_A", "defeat_other"])
def test_unknown_kind_fails(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        kind_of(name)


OWN = Path(__file__).parent / "cases"


def own_case(name: str, changed: dict[str, Tensor]) -> Case:
    """A file of the project's own with some arrays changed or added."""
    return Case(OWN, name, kind_of(name)[1], Arrays({**load(OWN / f"{name}.npz"), **changed}))


@pytest.mark.parametrize("name", ["anchors", "atss_A", "atss_assign", "gfl_A", "gfl_predict", "kl", "retina_A"])
def test_an_array_without_a_check_fails_by_name(name: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=rf"{name}.npz: no check for mystery_l0"):
        check(kind_of(name)[0], own_case(name, {"mystery_l0": torch.zeros(1)}))


@pytest.mark.parametrize("name", ["atss_A", "gfl_A", "ld_mmdet3_A", "retina_A"])
def test_a_loss_on_the_wrong_level_fails(name: str) -> None:
    golden = load(OWN / f"{name}.npz")["loss_bbox"]
    moved = golden + 0.01 * torch.tensor([1.0, -1, 0, 0, 0])  # the sum stays
    with pytest.raises(AssertionError, match="loss_bbox by level"):
        check(kind_of(name)[0], own_case(name, {"loss_bbox": moved}))


def test_hyper_parameters_are_those_of_the_file() -> None:
    golden = load(OWN / "ld_mmdet3_A.npz")
    twice = {key: 2 * value for key, value in golden.items() if key == "loss_ld" or key.startswith("d_loss_ld__")}
    check("ld_mmdet3", own_case("ld_mmdet3_A", {**twice, "loss_ld_weight": torch.tensor(0.5)}))
    with pytest.raises(AssertionError, match="loss_ld"):
        check("ld_mmdet3", own_case("ld_mmdet3_A", {"loss_ld_T": torch.tensor(9.0)}))


@pytest.mark.parametrize(("power", "weight"), [("1", "1p5"), ("2p5", "2p0"), ("3", "12")])
def test_numbers_in_keys(power: str, weight: str) -> None:
    beta, factor = (float(text.replace("p", ".")) for text in (power, weight))
    pred = torch.tensor([[0.5, -1.0], [2.0, 0.25]], requires_grad=True)
    target = torch.tensor([[1.0, -2.0], [0.0, 1.0]])
    p, q = pred.sigmoid(), target.sigmoid()
    rows = ((p - q).abs().pow(beta) * -(q * p.log() + (1 - q) * (1 - p).log())).sum(dim=-1)
    anchor = torch.tensor([0.5, 2.0])
    module = factor * (rows * anchor).sum() / 3
    arrays = {"pred": pred.detach(), "soft_label": target, "weight": anchor, "avg_factor": torch.tensor(3.0)}
    for form, loss in (("mean", rows.mean()), (f"module_lw{weight}", module)):
        arrays[f"beta{power}_loss_{form}"] = loss.detach().reshape(1)
        arrays[f"beta{power}_grad_{form}"] = torch.autograd.grad(loss, pred, retain_graph=True)[0]
    arrays[f"beta{power}_loss_none"] = rows.detach()
    check("bckd_cls", Case(OWN, "bckd_cls", "", Arrays(arrays)))
