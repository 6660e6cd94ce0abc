"""Samples by data workers, by threads and one by one: the same, and each image file is read once a batch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.engine.caching.plan import plan_store
from kdcli.engine.loading import loader, samples
from kdcli.engine.loading.loader import Loader
from kdcli.engine.loading.samples import Item, Sample, SampleSource
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training.setup import prepare
from kdcli.errors import DataError
from kdcli.store import batch_buffers
from tests.support.small_runs import cache_options, run_request

VIEWS = "identity,hflip,crop-2"


@pytest.fixture
def threads() -> Iterator[None]:
    """As many as before, afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def source(shapes: Path, teacher: Path, threads: None) -> SampleSource:
    """All regions and views of the drawn images; three threads."""
    plan = plan_store(
        cache_options(shapes, teacher, views=VIEWS, method="ld,rm,defeat_thin", threads=3), NullReporter()
    )
    return plan.source


def batches() -> list[list[Item]]:
    views = VIEWS.split(",")
    return [
        [(k, view) for k in (0, 1) for view in views],
        [(5, views[1]), (3, views[0]), (5, views[0])],
        [(7, views[2])],
    ]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return bool(one == other)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_do_not_depend_on_who_makes_them(source: SampleSource, workers: int) -> None:
    made = list(Loader(source, workers).samples(batches()))
    assert [[s.key.view for s in batch] for batch in made] == [[view for _, view in batch] for batch in batches()]
    for items, found in zip(batches(), made, strict=True):
        assert all(same(sample, source.load(item)) for item, sample in zip(items, found, strict=True))
    assert torch.get_num_threads() == 3


def test_a_loader_that_is_given_up_leaves_the_threads_alone(source: SampleSource) -> None:
    """It ends when Python collects it, which may be in the middle of something else."""
    left = Loader(source, 0).samples(batches())
    next(left)
    torch.set_num_threads(2)
    left.close()  # type: ignore[attr-defined]
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2


def test_neighbours_share_one_reading(source: SampleSource, monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = [], samples.read_image

    def read_image(path: Path, size: tuple[int, int], exif: bool) -> tuple[Tensor, bytes]:
        read.append(path)
        return real(path, size, exif)

    monkeypatch.setattr(samples, "read_image", read_image)
    for items in batches():
        source.load_batch(items)
    paths = [source.dataset.image_path(k) for k in (0, 1, 5, 3, 5, 7)]
    assert read == paths


@pytest.mark.usefixtures("threads")
def test_batches_of_large_rows_do_not_depend_on_who_makes_them(
    shapes: Path, default_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_buffers, "LEAST_BYTES", 1000)
    fields = run_request("distill", shapes, cache=str(default_store), method="pfi", micro_batch=2)
    source = prepare(fields.options(), frozenset(fields.fields), NullReporter()).source
    assert source.reader is not None
    plan = [[(k, view) for k in (0, 1)] for view in source.reader.views]
    here, there = (list(Loader(source, workers).batches(plan)) for workers in (0, 1))
    for items, one, other in zip(plan, here, there, strict=True):
        alone = [source.load(item) for item in items]
        assert same(one, other)
        assert same(one, samples.collate(alone, source.reader))
        assert all(s.slot is None for s in alone)
    paths = [path for path, value in there[0].rows.items() if value[0].nbytes >= 1000]
    assert "tensors/features@all/values" in paths
    assert all(there[0].rows[path].is_shared() for path in paths if there[0].rows[path].nbytes > loader.PIPE_BYTES)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("workers", [0, 1])
def test_the_first_error_of_a_batch_is_raised(shapes: Path, teacher: Path, tmp_path: Path, workers: int) -> None:
    data = shutil.copytree(shapes, tmp_path / "data")
    source = plan_store(cache_options(data, teacher, method="rm", threads=3), NullReporter()).source
    for position in (1, 2):
        source.dataset.image_path(position).write_bytes(b"no picture")
    loaded = Loader(source, workers).samples([[(0, "identity")], [(k, "identity") for k in range(4)]])
    first: list[Sample] = next(loaded)
    assert len(first) == 1
    with pytest.raises(DataError, match=source.dataset.image_path(1).name):
        next(loaded)
