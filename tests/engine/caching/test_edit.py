"""cache add, prune, merge: what comes out is what cache-teacher would have written, byte for byte."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from kdcli.engine.caching import add as add_module
from kdcli.engine.caching import edit as edit_module
from kdcli.engine.caching.verify import verify_checksums
from kdcli.engine.runtime.progress import NullReporter
from kdcli.errors import OptionError, StoreError
from kdcli.store import maintenance as mechanics
from kdcli.store.manifest import read_manifest
from kdcli.store.reader import StoreReader
from kdcli.structures import RowKey
from tests.support.files import contents
from tests.support.selection import matrix
from tests.support.small_runs import cache_options, make_teacher, write


def add(store: Path, methods: str) -> list[str]:
    return add_module.add(store, None, None, methods, {}, "default", NullReporter())


@pytest.mark.parametrize(
    ("first", "second"),
    matrix(
        [
            ("rm", "ld,pfi"),
            ("pfi", "ld"),
            ("ld,pfi", "rm"),
            ("ld", "defeat_thin,bckd"),
            ("defeat", "defeat_thin,rm"),
            ("defeat_thin,rm", "defeat"),
        ]
    ),
)
def test_added_tensors_are_those_of_one_writing(
    shapes: Path, teacher: Path, tmp_path: Path, first: str, second: str
) -> None:
    store = write(cache_options(shapes, teacher, method=first), tmp_path / "store")
    whole = write(cache_options(shapes, teacher, method=f"{first},{second}"), tmp_path / "whole")
    add(store, second)
    assert contents(store) == contents(whole)
    verify_checksums(store, NullReporter())
    assert add(store, second) == []
    assert contents(store) == contents(whole)


def forked(work: partial[object]) -> int:
    """The status of a child that does ``work``."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


class Bomb:
    """Kills this process at the ``number``-th call of a function."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: object, name: str, number: int) -> None:
        self.left, self.real = number, getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __call__(self, *arguments: object, **more: object) -> object:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), 9)
        return self.real(*arguments, **more)


@pytest.mark.parametrize(
    ("name", "number"), matrix([("_move", 1), ("_move", 9), ("write_entry", 2), ("write_manifest", 1)])
)
def test_a_killed_add_leaves_a_store_that_reads_and_goes_on(
    shapes: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    store = write(cache_options(shapes, teacher, method="ld"), tmp_path / "store")
    whole = write(cache_options(shapes, teacher, method="ld,pfi"), tmp_path / "whole")
    with monkeypatch.context() as patch:
        Bomb(patch, mechanics, name, number)
        assert os.WIFSIGNALED(forked(partial(add, store, "pfi")))
    reader = StoreReader(store)
    for image in reader.image_ids:
        reader.read(RowKey(image, "hflip"))
    add(store, "pfi")
    assert contents(store) == contents(whole)


def test_a_reader_at_work_reads_on_while_more_is_added(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    """The entries of its rows become more, in files that it has not opened yet."""
    store = write(cache_options(shapes, teacher, method="rm"), tmp_path / "store")
    keys = [RowKey(image, view) for image in StoreReader(store).image_ids for view in ("identity", "hflip")]
    before = [StoreReader(store).read(key).arrays for key in keys]
    reader = StoreReader(store)
    reader.read(keys[0])
    add(store, "ld")
    for key, arrays in zip(keys, before, strict=True):
        found = reader.read(key)
        assert found.entries is not None
        assert found.arrays.keys() == arrays.keys()
        for path, value in arrays.items():
            np.testing.assert_array_equal(found.arrays[path], value, strict=True)


@pytest.mark.parametrize(("methods", "images", "place"), [("ld", False, 1), ("", True, 17)])
def test_adding_after_an_image_changed_is_refused(
    shapes: Path, teacher: Path, tmp_path: Path, methods: str, images: bool, place: int
) -> None:
    """Its old tensors would stay beside new ones, or beside pixels that the teacher never saw."""
    data = Path(shutil.copytree(shapes, tmp_path / "data"))
    store = write(cache_options(data, teacher, method="rm"), tmp_path / "store")
    before = contents(store)
    file = sorted((data / "train").iterdir())[place]
    whole = file.read_bytes()
    with Image.open(file) as image:
        ImageOps.invert(image.convert("RGB")).save(file)
    with pytest.raises(
        StoreError, match=rf"image {place + 1}, view identity: .*\.(png|jpg)' is not the file that the teacher saw"
    ):
        add_module.add(store, None, None, methods, {}, "default", NullReporter(), images=images)
    assert contents(store) == before
    file.write_bytes(whole)
    assert add_module.add(store, None, None, methods, {}, "default", NullReporter(), images=images)
    verify_checksums(store, NullReporter())


def test_adding_with_another_teacher_is_refused(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    store = write(cache_options(shapes, teacher, method="rm"), tmp_path / "store")
    other = make_teacher(tmp_path / "other.pt", seed=5)
    before = contents(store)
    with pytest.raises(StoreError, match="weights_sha256"):
        add_module.add(store, None, str(other), "ld", {}, "default", NullReporter())
    assert contents(store) == before


def test_pruned_tensors_leave_what_would_have_been_written(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    store = write(cache_options(shapes, teacher, method="ld,rm,pfi"), tmp_path / "store")
    less = write(cache_options(shapes, teacher, method="rm,pfi"), tmp_path / "less")
    dropped = ["box_distribution@main+vlr", "cls_logits@main"]
    kept = [t.need.key for t in StoreReader(less).schema.tensors]
    gone = [t.need.key for t in StoreReader(store).schema.tensors if t.need.key not in kept]
    assert set(gone) <= set(dropped)
    assert edit_module.prune_tensors(store, gone, NullReporter()) == gone
    assert read_manifest(store).methods == ("rm", "pfi")
    ours, theirs = contents(store), contents(less)
    entries = {k for k in ours if k.startswith(("entries/", "journal/"))}  # still those of the VLR
    assert {k: v for k, v in ours.items() if k not in entries} == {k: v for k, v in theirs.items() if k not in entries}
    errors = read_manifest(store).errors
    assert errors is not None
    assert set(errors.encoding) == set(kept)
    assert errors == read_manifest(less).errors
    verify_checksums(store, NullReporter())


@pytest.mark.parametrize(("name", "number"), matrix([("write_manifest", 1), ("write_entry", 3)]))
def test_a_killed_prune_goes_on(
    shapes: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    whole = write(cache_options(shapes, teacher, method="ld,pfi"), tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "store")
    edit_module.prune_tensors(whole, ["cls_logits@all"], NullReporter())
    with monkeypatch.context() as patch:
        Bomb(patch, mechanics, name, number)
        assert os.WIFSIGNALED(
            forked(partial(edit_module.prune_tensors, tmp_path / "store", ["cls_logits@all"], NullReporter()))
        )
    StoreReader(tmp_path / "store")
    edit_module.prune_tensors(tmp_path / "store", ["cls_logits@all"], NullReporter())
    assert contents(tmp_path / "store") == contents(whole)


def test_what_cannot_be_pruned(lossless_store: Path, tmp_path: Path) -> None:
    keys = [t.need.key for t in StoreReader(lossless_store).schema.tensors]
    with pytest.raises(OptionError, match="has no nothing@all"):
        edit_module.prune_tensors(lossless_store, ["nothing@all"], NullReporter())
    with pytest.raises(OptionError, match="nothing would be left"):
        edit_module.prune_tensors(lossless_store, keys, NullReporter())
    with pytest.raises(OptionError, match="has no view"):
        edit_module.prune_views(lossless_store, ["crop-0"], tmp_path / "out", NullReporter())


def data(store: Path) -> dict[str, str]:
    """Files but the journal, which has the errors of shards that were written otherwise, and the manifest."""
    return {k: v for k, v in contents(store).items() if not k.startswith("journal/") and k != "zarr.json"}


def test_views_merge_and_part_again(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    whole = write(cache_options(shapes, teacher), tmp_path / "whole")
    one = write(cache_options(shapes, teacher, views="identity", shard_rows=7), tmp_path / "one")
    two = write(cache_options(shapes, teacher, views="hflip", shard_rows=10), tmp_path / "two")
    both = tmp_path / "both"
    assert edit_module.merge([two, one], both, None, NullReporter()) == 48
    assert StoreReader(both).views == ("hflip", "identity")
    both = tmp_path / "in-order"
    edit_module.merge(
        [write(cache_options(shapes, teacher, views="identity"), tmp_path / "three"), two], both, None, NullReporter()
    )
    assert data(both) == data(whole)
    merged, written = read_manifest(both), read_manifest(whole)
    assert replace(merged, errors=None) == replace(written, errors=None)
    assert merged.errors is not None
    assert written.errors is not None
    assert set(merged.errors.encoding) == set(written.errors.encoding)
    for key, error in written.errors.encoding.items():  # sums of the same rows in another order
        assert merged.errors.encoding[key] == pytest.approx(error, rel=1e-12)
    verify_checksums(both, NullReporter())
    assert edit_module.prune_views(whole, ["hflip"], tmp_path / "less", NullReporter()) == 24
    assert data(tmp_path / "less") == data(tmp_path / "three")
    with pytest.raises(StoreError, match="that another store has too"):
        edit_module.merge([one, whole], tmp_path / "twice", None, NullReporter())
    assert not (tmp_path / "twice").exists()


def test_stores_that_do_not_go_together(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    one = write(cache_options(shapes, teacher, method="rm", views="identity"), tmp_path / "one")
    other = write(cache_options(shapes, teacher, method="pfi", views="hflip"), tmp_path / "other")
    with pytest.raises(StoreError, match=r"do not go together: schema\.tensors"):
        edit_module.merge([one, other], tmp_path / "out", None, NullReporter())
    assert not (tmp_path / "out").exists()
