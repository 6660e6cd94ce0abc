"""A whole reference file: everything in it is checked, and what its name does not say is found out from what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from tests.support.golden.case import Arrays, Case
from tests.support.golden.checks import CHECKS
from tests.support.golden.defeat import STRIDES
from tests.support.golden.ld import IMITATIONS

# what a check of each kind asks the file's name for
ASKED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("atss", "bckd_loc", "fcos", "fcosplus", "gfl", "gfl_predict", "ld_mmdet3", "retina"), ("batch",)),
    **dict.fromkeys(("bckd_head", "ld_repo"), ("batch", "imitation")),
    "defeat_neck": ("strides",),
    "vlr_im_region": ("batch",),  # of the general instances
}


def kind_of(name: str) -> tuple[str, str]:
    """(kind, rest) of a file's name: the longest known kind it starts with, and what follows.

    Raises KeyError for a name of no known kind.
    """
    for kind in sorted(CHECKS, key=len, reverse=True):
        if name == kind or name.startswith(f"{kind}_"):
            return kind, name[len(kind) + 1 :].removesuffix("_lowscore").removeprefix("lowscore")
    raise KeyError(name)


def check(kind: str, case: Case) -> None:
    """Check a file, that no array of it went unread, and that something was compared.

    A file whose name does not say its batch (or imitation, or strides) is held against each there is: it must agree with
    one in everything.
    """
    tried = []
    for choice in choices(kind, case):
        try:
            check_choice(kind, replace(case, choice=choice, arrays=Arrays(case.arrays)))
        except (AssertionError, pytest.fail.Exception, RuntimeError, KeyError, IndexError) as error:
            if not choice:  # of a wrong choice the shapes differ too
                raise
            tried.append(f"{' '.join(choice.values())}: {str(error).splitlines()[0]}")
        else:
            return
    pytest.fail(f"{case.name}.npz: its name does not say which it is, and it agrees with none:\n" + "\n".join(tried))


def choices(kind: str, case: Case) -> Iterator[dict[str, str]]:
    """Every combination of what the name leaves open; one empty choice where it leaves nothing."""
    known = {"imitation": IMITATIONS, "strides": tuple(STRIDES)}
    asked = {what: case.batches if what == "batch" else known[what] for what in ASKED.get(kind, ())}
    open_ = {what: names for what, names in asked.items() if case.chosen(what, names) is None}
    for values in product(*open_.values()):
        yield dict(zip(open_, values, strict=True))


def check_choice(kind: str, case: Case) -> None:
    """Check a file of a batch that is known."""
    CHECKS[kind](case)
    if unseen := case.arrays.unseen():
        pytest.fail(f"{case.name}.npz: no check for {', '.join(unseen)}")
    if not case.arrays.compared:
        pytest.fail(f"{case.name}.npz: holds nothing that could be checked")
