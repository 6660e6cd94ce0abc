"""Every reference file of the golden folder (``--golden DIR``), checked by its kind; an unknown kind fails by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_case import Case, load
from golden_checks import CHECKS


def kind_of(name: str) -> tuple[str, str]:
    """(kind, batch) of a file's name: the longest known kind it starts with, and what follows.

    Raises KeyError for a name of no known kind.
    """
    for kind in sorted(CHECKS, key=len, reverse=True):
        if name == kind or name.startswith(f"{kind}_"):
            return kind, name[len(kind) + 1 :].removesuffix("_lowscore").removeprefix("lowscore")
    raise KeyError(name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each file; a folder without files is one failing test, not none. Inputs are no cases."""
    if "golden_file" in metafunc.fixturenames:
        folder = metafunc.config.getoption("golden")
        files = sorted(p for p in folder.glob("*.npz") if p.stem != "batches" and not p.stem.startswith("inputs_"))
        files = files or [folder / "no files here"]
        metafunc.parametrize("golden_file", files, ids=[f.stem for f in files])


def test_file(golden_file: Path) -> None:
    try:
        kind, batch = kind_of(golden_file.stem)
    except KeyError:
        pytest.fail(f"{golden_file.name}: no check for this kind of file; known kinds: {', '.join(CHECKS)}")
    CHECKS[kind](Case(golden_file.parent, golden_file.stem, batch, load(golden_file)))


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
    ],
)
def test_kind_of(name: str, expected: tuple[str, str]) -> None:
    assert kind_of(name) == expected


@pytest.mark.parametrize("name", ["gflv2_A", "mystery", "ldx_A", "ld_other_A", "defeat_other"])
def test_unknown_kind_fails(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        kind_of(name)
