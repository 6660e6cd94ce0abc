"""A store of another device, or of a compiled teacher: what can be added to it, verified, and what the manifest says then.

There is no GPU here. A store that says that a GPU wrote it stands in for one.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcli.cli.main import run
from kdcli.engine.caching import add as add_module
from kdcli.engine.caching import edit
from kdcli.engine.caching.verify import plan_of_store, verify_checksums, verify_teacher
from kdcli.engine.runtime.progress import NullReporter
from kdcli.errors import OptionError, StoreError
from kdcli.store.image_codec import PIXELS
from kdcli.store.manifest import read_manifest
from kdcli.store.provenance import AddedOn
from kdcli.store.reader import StoreReader
from kdcli.structures import RowKey
from tests.support.files import contents
from tests.support.rebind import rebind
from tests.support.selection import matrix
from tests.support.small_runs import cache_options, make_teacher, write


class Lines(NullReporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def of_a_gpu(store: Path) -> Path:
    """``store`` with the manifest that it would have from a GPU."""
    manifest = read_manifest(store)
    rebind(store, replace(manifest, teacher_run=replace(manifest.teacher_run, device="cuda", threads=None)))
    return store


def add(store: Path, methods: str, **more: Any) -> list[str]:
    reporter = more.pop("reporter", NullReporter())
    return add_module.add(store, None, None, methods, {}, "default", reporter, **more)


def rows(store: Path) -> dict[tuple[int, str, str], bytes]:
    """Every array of every row."""
    reader = StoreReader(store)
    keys = [RowKey(int(i), v) for i in reader.image_ids for v in reader.views]
    return {
        (key.image_id, key.view, path): np.asarray(value).tobytes()
        for key in keys
        for path, value in reader.read(key).arrays.items()
    }


def test_cached_images_are_added_anywhere(
    shapes: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = of_a_gpu(write(cache_options(shapes, teacher, method="rm"), tmp_path / "store"))
    before, manifest = rows(store), read_manifest(store)
    assert run(["cache", "add", str(store), "--cache-images"]) == 0, capsys.readouterr().err
    after = rows(store)
    assert {k: v for k, v in after.items() if k[2] != PIXELS} == before
    whole = write(cache_options(shapes, teacher, method="rm", cache_images=True), tmp_path / "whole")
    assert after == rows(whole)
    old = manifest.to_json()
    changed = {k for k, v in read_manifest(store).to_json().items() if v != old[k]}
    assert changed == {"schema"}  # nothing was computed, so there is nothing to say of a device


def test_tensors_of_another_device_say_so(
    shapes: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = of_a_gpu(write(cache_options(shapes, teacher, method="rm"), tmp_path / "store"))
    before = contents(store)
    with pytest.raises(OptionError, match="sees no GPU; use --device cpu"):
        add(store, "pfi")
    assert contents(store) == before
    old, lines = rows(store), Lines()
    threads = torch.get_num_threads()
    new = add(store, "pfi", device="cpu", reporter=lines)
    assert old.items() <= rows(store).items()
    assert [line for line in lines.said if "what is added is computed on cpu, what is there was on cuda" in line]
    manifest = read_manifest(store)
    assert manifest.teacher_run.device == "cuda"
    assert manifest.added_on == {key: AddedOn(device="cpu", threads=threads) for key in new}
    verify_checksums(store, NullReporter())
    assert run(["cache", "info", str(store)]) == 0
    assert f"added later on another device: {new[0]}, device cpu, threads {threads}" in capsys.readouterr().err
    assert add(store, "pfi", device="cpu") == []
    edit.prune_tensors(store, new, NullReporter())
    assert read_manifest(store).added_on == {}


def test_the_same_device_named_changes_nothing(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    store = write(cache_options(shapes, teacher, method="rm"), tmp_path / "store")
    whole = write(cache_options(shapes, teacher, method="rm,ld"), tmp_path / "whole")
    add(store, "ld", device="cpu")
    assert contents(store) == contents(whole)


def test_proposals_of_two_devices_do_not_mix(shapes: Path, tmp_path: Path) -> None:
    """The RoI head of one would be read at the boxes of the other."""
    teacher = make_teacher(tmp_path / "teacher.pt", detector="faster_rcnn", scale=5.0)
    weights = {"defeat": {"obj_cls_weight": 1.0}}
    store = write(cache_options(shapes, teacher, method="defeat", methods=weights), tmp_path / "store")
    edit.prune_tensors(store, ["proposals/logits@proposals"], NullReporter())
    of_a_gpu(store)
    with pytest.raises(StoreError, match="on cpu the proposals may be others: add to it with --device cuda"):
        add_module.add(store, None, None, "defeat", weights, "default", NullReporter(), device="cpu")


def test_stores_with_tensors_of_other_devices_do_not_merge(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    one = of_a_gpu(write(cache_options(shapes, teacher, method="rm", views="identity"), tmp_path / "one"))
    two = of_a_gpu(write(cache_options(shapes, teacher, method="rm,pfi", views="hflip"), tmp_path / "two"))
    add(one, "pfi", device="cpu")
    with pytest.raises(StoreError, match="added_on"):
        edit.merge([one, two], tmp_path / "out", None, NullReporter())


def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: real(model, backend="eager", **options))


@pytest.mark.full
def test_a_store_of_a_compiled_teacher_is_extended_and_verified(
    shapes: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager(monkeypatch)
    options = cache_options(shapes, teacher, method="rm", compile=True)
    store = write(options, tmp_path / "store")
    whole = write(cache_options(shapes, teacher, method="rm,ld", compile=True), tmp_path / "whole")
    plan = plan_of_store(store, str(shapes), str(teacher), None, NullReporter())
    assert plan.teacher.forward.network is not None
    assert plan.manifest.teacher_run == read_manifest(store).teacher_run
    assert verify_teacher(plan, store, 4, NullReporter())[0] == 4
    shutil.copytree(store, tmp_path / "with_images")
    add(store, "ld")
    assert contents(store) == contents(whole)

    def missing(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is compiled for images alone")

    monkeypatch.setattr(torch, "compile", missing)
    assert add(tmp_path / "with_images", "", images=True) == [PIXELS]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "changes",
    matrix(
        [
            {"view_seed": 7, "views": "identity,crop-2"},
            {"precision": "bf16", "micro_batch": 3},
            {"canvas": "64x96", "encoding": "lossless"},
            {"methods": {"ld": {"temperature": 5.0}}, "cache_images": True},
        ]
    ),
)
def test_every_setting_of_the_writing_is_known_again(
    shapes: Path, teacher: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The plan made from the manifest is the one that wrote it; what is added is what one writing would have written."""
    store = write(cache_options(shapes, teacher, method="ld", **changes), tmp_path / "store")
    plan, stored = plan_of_store(store, str(shapes), str(teacher), None, NullReporter()), read_manifest(store)
    assert (
        replace(plan.manifest, teacher=stored.teacher, errors=stored.errors) == stored
    )  # both are measured in writing
    whole = write(cache_options(shapes, teacher, method="ld,rm", **changes), tmp_path / "whole")
    add_module.add(store, None, None, "rm", {}, changes.get("encoding", "default"), NullReporter())
    assert contents(store) == contents(whole)


def test_what_a_pruned_store_still_has_is_verified(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    """No method of it is left whole, and the tensors are."""
    store = write(cache_options(shapes, teacher, method="ld,pfi"), tmp_path / "store")
    keys = [t.need.key for t in StoreReader(store).schema.tensors]
    kept = "box_distribution@main+vlr"
    edit.prune_tensors(store, [k for k in keys if k != kept], NullReporter())
    assert read_manifest(store).methods == ()
    plan = plan_of_store(store, str(shapes), str(teacher), None, NullReporter())
    assert list(verify_teacher(plan, store, 4, NullReporter())[1]) == [kept]


def test_what_a_pruned_store_still_has_stays_when_something_is_added(
    shapes: Path, teacher: Path, tmp_path: Path
) -> None:
    store = write(cache_options(shapes, teacher, method="ld"), tmp_path / "store")
    assert edit.prune_tensors(store, ["cls_logits@main"], NullReporter()) == ["cls_logits@main"]
    before = rows(store)
    assert add(store, "pfi") == ["cls_logits@all", "features@all"]
    assert before.items() <= rows(store).items()
    verify_checksums(store, NullReporter())


def test_regions_that_tensors_lie_in_do_not_change(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    store = write(cache_options(shapes, teacher, method="ld"), tmp_path / "store")
    before = contents(store)
    with pytest.raises(StoreError, match=r"tensors in other regions: regions\.vlr_gamma: store 0.25, here 0.5"):
        add_module.add(store, None, None, "ld,rm", {"ld": {"vlr_gamma": 0.5}}, "default", NullReporter())
    assert contents(store) == before


def test_images_are_added_to_a_pruned_store_with_regions_of_its_own(
    shapes: Path, teacher: Path, tmp_path: Path
) -> None:
    """The guard of a row depends on them, and the method that asked for them is gone."""
    gamma = {"ld": {"vlr_gamma": 0.5}}
    store = write(cache_options(shapes, teacher, method="ld", methods=gamma), tmp_path / "store")
    edit.prune_tensors(store, ["cls_logits@main"], NullReporter())
    before = rows(store)
    assert add(store, "", images=True) == [PIXELS]
    assert {k: v for k, v in rows(store).items() if k[2] != PIXELS} == before
    assert read_manifest(store).regions["vlr_gamma"] == 0.5
    plan = plan_of_store(store, str(shapes), str(teacher), None, NullReporter())
    assert verify_teacher(plan, store, 4, NullReporter())[0] == 4
