"""What a run takes over from the options that a store was written with."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training.setup import prepare
from kdcli.methods.resolve import find_methods, resolve_all
from tests.support.small_runs import cache_options, run_request, write


class Listening(NullReporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture(scope="module")
def store(shapes: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose manifest has weights and a region option other than the defaults."""
    written = {"ld": {"weight": 3.0, "vlr_gamma": 0.3}, "pfi": {"weight": 7.0}}
    return write(
        cache_options(shapes, teacher, method="ld,pfi", methods=written), tmp_path_factory.mktemp("s") / "store"
    )


def test_regions_are_taken_over_and_weights_are_not(store: Path, shapes: Path) -> None:
    """A manifest is of its day: the run has today's weights, the store's regions, and a line says so."""
    fields = run_request("distill", shapes, cache=str(store), method="ld,pfi")
    heard = Listening()
    made = prepare(fields.options(), frozenset(fields.fields), heard)
    today = resolve_all(find_methods("ld,pfi"), "gfl", {}, made.student.region_defaults)
    assert made.options.methods["pfi"] == today["pfi"]
    assert made.options.methods["ld"] == {**today["ld"], "vlr_gamma": 0.3}
    assert today["ld"]["vlr_gamma"] != 0.3
    said = {m.partition(":")[0]: m for m in heard.messages if "of a store it takes over regions alone" in m}
    assert said.keys() == {"ld", "pfi"}
    assert f"pfi: the run takes weight = {today['pfi']['weight']} (the store says 7.0);" in said["pfi"]
    assert "vlr_gamma" not in said["ld"]


def test_what_is_given_is_not_explained(store: Path, shapes: Path, lossless_store: Path) -> None:
    given = {"ld": {"weight": 0.5}, "pfi": {"weight": 0.5}}
    fields = run_request("distill", shapes, cache=str(store), method="ld,pfi", methods=given)
    heard = Listening()
    made = prepare(fields.options(), frozenset(fields.fields), heard)
    assert made.options.methods["pfi"]["weight"] == 0.5
    same = run_request("distill", shapes, cache=str(lossless_store), method="ld,pfi")
    prepare(same.options(), frozenset(same.fields), heard)
    assert not any("takes over" in m for m in heard.messages)
