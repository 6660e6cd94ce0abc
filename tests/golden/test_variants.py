"""Files that nobody has seen: variants of the reference files, of the project's own and of ``--golden DIR``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.golden.variants import Source, Variant, variants_of
from tests.support.golden.case import Arrays, Case, load
from tests.support.golden.whole import check, kind_of
from tests.support.selection import matrix

OWN = Path(__file__).parent / "cases"
QUICK = ("gfl_A", "kl", "atss_assign")  # of make test: the rest is of the same code


def references(folder: Path) -> list[Path]:
    """The files of a folder that are cases."""
    return sorted(p for p in folder.glob("*.npz") if p.stem != "batches" and not p.stem.startswith("inputs_"))


def outcome(variant: Variant) -> str | None:
    """What a variant fails with; None where all of it agrees."""
    load.cache_clear()
    kind, rest = kind_of(variant.name)
    try:
        check(kind, Case(variant.folder, variant.name, rest, Arrays(load(variant.folder / f"{variant.name}.npz"))))
    except (AssertionError, pytest.fail.Exception) as error:
        return str(error)
    return None


def require(file: Path, out: Path, *, every_array: bool) -> None:
    """Every variant of ``file`` ends as it must. ``every_array``: each array corrupted, not the first and the last alone."""
    source = Source(file, kind_of(file.stem)[0], out)
    variants = list(variants_of(source))
    wrong = [v for v in variants if v.what.startswith("wrong ")]
    left_out = () if every_array else wrong[1:-1]
    surprises = []
    for variant in variants:
        if variant in left_out:
            continue
        found = outcome(variant)
        expected = variant.fails
        if (found is None) != (expected is None):
            surprises.append(f"{variant.what}: {found or 'agrees'}")
        elif found is not None and expected is not None and not re.search(expected, found, re.DOTALL):
            surprises.append(f"{variant.what}: {found}")
    assert not surprises, "\n".join(surprises)
    assert len(variants) > len(wrong) >= 1


@pytest.mark.parametrize("file", matrix(references(OWN), lambda f: f.stem in QUICK), ids=lambda f: f.stem)
def test_variants_of_our_own_files(file: Path, tmp_path: Path) -> None:
    require(file, tmp_path, every_array=False)


@pytest.mark.full
def test_every_array_is_compared(tmp_path: Path) -> None:
    for file in references(OWN):
        require(file, tmp_path / file.stem, every_array=True)


@pytest.mark.full
def test_variants_of_the_folder_that_is_named(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """With ``--golden DIR`` every file of DIR; else the same files again."""
    for file in references(Path(request.config.getoption("golden"))):
        require(file, tmp_path / file.stem, every_array=False)
