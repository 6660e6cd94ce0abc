"""The order of an epoch: the full shuffle is what it always was; the shard-local one keeps every promise but uniformity."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kdcli.cli.main import run
from kdcli.detectors.dense.recipes import GFL
from kdcli.engine.loading import epoch_order
from kdcli.engine.loading.epoch_order import plan_epoch, shard_windows
from kdcli.engine.loading.samples import Item, SampleSource
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training import launch, run_config
from kdcli.errors import OptionError
from kdcli.geometry.regions import RegionSpec
from kdcli.options import TrainOptions
from kdcli.structures import Canvas, RowKey
from tests.support.small_runs import run_request
from tests.support.stopping import Stop, Stopping, weights

VIEWS = ("identity", "hflip")
SHARD_ROWS = 64  # 32 images
IMAGES = 5000
# sha256 of three epochs' plans, from the code before there was another order
GOLDEN = {
    1: "b0b20b5e5dc1f4a523b2e1824cee3b5864cdf92137ae57bd99723009f1d8934b",
    2: "3f3a62e0becc4f17fd141c21b0e4643169b949f0a0dd544a5b8805a360bc842b",
}


class FakeDataset:
    """Ids and sizes of a data set: one image in ``portrait`` stands upright."""

    def __init__(self, number: int, portrait: int = 5) -> None:
        self.ids = np.arange(number, dtype=np.int64) * 7919 % 100003 + 1
        self.annotations = SimpleNamespace(image_ids=self.ids)
        self.num_images = number
        self.portrait = portrait

    def image_id(self, position: int) -> int:
        return int(self.ids[position])

    def image_size(self, position: int) -> tuple[int, int]:
        return (480, 640) if position % self.portrait else (640, 480)


class Shards:
    """A store's shards: rows in the order of the images, the views of an image side by side."""

    def __init__(self, images: FakeDataset) -> None:
        self.row = {int(image): k for k, image in enumerate(images.ids)}

    def shard_of(self, key: RowKey) -> int:
        return (self.row[key.image_id] * len(VIEWS) + VIEWS.index(key.view)) // SHARD_ROWS


def source_of(images: FakeDataset) -> SampleSource:
    stub: Any = images
    reader: Any = Shards(images)
    return SampleSource(
        dataset=stub, canvas=Canvas(256, 320), view_seed=0, grid=GFL.grid, assigner=GFL.assigner, region_spec=RegionSpec(),
        reader=reader,
    )  # fmt: skip


SOURCE = source_of(FakeDataset(IMAGES))


def plan(epoch: int = 0, seed: int = 0, shuffle: Any = "shards", world: int = 1, rank: int = 0) -> list[list[Item]]:
    return plan_epoch(
        SOURCE, np.arange(IMAGES), VIEWS, seed=seed, epoch=epoch, batch=16, world=world, rank=rank, shuffle=shuffle
    )


def shards_of(batch: list[Item]) -> list[int]:
    reader: Any = SOURCE.reader
    return [reader.shard_of(RowKey(SOURCE.dataset.image_id(p), view)) for p, view in batch]


@pytest.mark.parametrize("world", [1, 2])
def test_the_full_shuffle_has_not_changed(world: int) -> None:
    source = source_of(FakeDataset(211))
    positions = np.array([p for p in range(211) if p % 13], np.int64)
    views = (*VIEWS, "crop-0")
    plans = [
        plan_epoch(source, positions, views, seed=5, epoch=epoch, batch=16, world=world, rank=rank)
        for epoch in range(3)
        for rank in range(world)
    ]
    assert hashlib.sha256(json.dumps(plans).encode()).hexdigest() == GOLDEN[world]


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_image_once_in_the_view_of_the_full_shuffle(epoch: int) -> None:
    ours, full = plan(epoch), plan(epoch, shuffle="full")
    assert sorted(i for batch in ours for i in batch) == sorted(i for batch in full for i in batch)
    assert sorted(map(len, ours)) == sorted(map(len, full))
    assert sorted(map(len, ours))[2:] == [16] * (len(ours) - 2)  # a short one for each orientation
    for batch in ours:
        assert len({p % 5 == 0 for p, _ in batch}) == 1
    assert ours != full


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    assert plan(3, seed=2) == plan(3, seed=2)
    orders = [plan(0), plan(1), plan(0, seed=1)]
    for k, one in enumerate(orders):
        for other in orders[:k]:
            ours, theirs = ([shards_of(batch)[0] for batch in p] for p in (one, other))
            agree = np.mean([a == b for a, b in zip(ours, theirs, strict=True)])
            assert agree < 0.1  # the shards come in another order, not only the images


def test_few_shards_at_a_time() -> None:
    """Ten batches in a row touch the shards of two windows at most, and those of what was left of earlier ones."""
    windows = -(-IMAGES * len(VIEWS) // SHARD_ROWS) // epoch_order.WINDOW_SHARDS
    left_over = 2 * 15  # less than a batch of either orientation

    def most(batches: list[list[Item]]) -> int:
        return max(len({s for b in batches[k : k + 10] for s in shards_of(b)}) for k in range(len(batches) - 9))

    batches = plan()
    assert most(batches) <= 2 * (epoch_order.WINDOW_SHARDS + 2) + left_over
    assert most(plan(shuffle="full")) > 90
    # a shard is read in one stretch of the epoch, not all over it
    seen: dict[int, list[int]] = {}
    for k, batch in enumerate(batches):
        for shard in shards_of(batch):
            seen.setdefault(shard, []).append(k)
    stretches = [max(places) - min(places) + 1 for places in seen.values()]
    assert max(stretches) <= 2 * (len(batches) // windows + 2)
    assert np.median(stretches) <= len(batches) // windows + 2
    # and a batch is not from one shard: a pair of its images meets in one as often as 1 in 16
    pairs = [a == b for batch in batches for k, b in enumerate(shards_of(batch)) for a in shards_of(batch)[:k]]
    assert np.mean(pairs) == pytest.approx(1 / epoch_order.WINDOW_SHARDS, rel=0.2)


def test_windows_are_whole_shards() -> None:
    reader: Any = SOURCE.reader
    keys = [RowKey(int(i), VIEWS[int(i) % 2]) for i in SOURCE.dataset.annotations.image_ids]
    homes: dict[int, set[int]] = {}
    for key, window in zip(keys, shard_windows(reader, keys, 0, 0).tolist(), strict=True):
        homes.setdefault(window, set()).add(reader.shard_of(key))
    assert set(homes) == set(range(9))
    assert all(len(home) in (17, 18) for home in homes.values())
    assert sum(len(home) for home in homes.values()) == 157
    assert len(set.union(*homes.values())) == 157


def test_below_two_windows_it_is_the_full_shuffle() -> None:
    images = 31 * SHARD_ROWS // len(VIEWS)
    source = source_of(FakeDataset(images))
    asked_for: Any = {"seed": 1, "epoch": 2, "batch": 16}
    plans = [plan_epoch(source, np.arange(images), VIEWS, **asked_for, shuffle=s) for s in ("full", "shards")]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("shuffle", ["full", "shards"])
def test_two_processes_share_the_batches_of_one(shuffle: str) -> None:
    whole = plan(shuffle=shuffle)
    halves = [plan(shuffle=shuffle, world=2, rank=rank) for rank in (0, 1)]
    assert len(whole) == len(halves[0]) == len(halves[1])
    for batch, left, right in zip(whole, *halves, strict=True):
        assert len(left) == len(right) == 8
        assert (left + right)[: len(batch)] == batch


def test_a_stopped_run_goes_on_in_the_same_order(
    shapes: Path, default_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epoch_order, "WINDOW_SHARDS", 1)  # five windows of five images
    fields = run_request(
        "distill", shapes, cache=str(default_store), method="rm", shuffle="shards", save_steps=2, epochs=1
    )
    _, whole = launch.start(fields, tmp_path / "whole", NullReporter(), overwrite=False)
    assert tomllib.loads((tmp_path / "whole" / "config.toml").read_text())["shuffle"] == "shards"
    with pytest.raises(Stop):
        launch.start(fields, tmp_path / "run", Stopping(), overwrite=False)
    _, resumed = launch.resume(tmp_path / "run", run_config.from_flags("distill", {}, {}, None, {}), NullReporter())
    assert weights(resumed) == weights(whole)
    with pytest.raises(OptionError, match="shuffle: shards -> full"):
        launch.resume(
            tmp_path / "run", run_config.from_flags("distill", {"shuffle": "full"}, {}, None, {}), NullReporter()
        )


def test_it_needs_a_store(shapes: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side in ({}, {"command": "distill", "teacher": "runs/teacher"}):
        with pytest.raises(OptionError, match="add --cache STORE") as found:
            TrainOptions(shuffle="shards", **side)  # type: ignore[arg-type]
        assert "\n" not in str(found.value)
    train = ["train", "--data", str(shapes), "--model", "gfl_resnet18", "--out", str(tmp_path / "run")]
    assert run([*train, "--set", "train.shuffle=shards"]) == 3
    live = ["--teacher", str(teacher), "--method", "ld", "--shuffle", "shards"]
    assert run(["distill", *train[1:], *live]) == 3
    assert run(["distill", *train[1:], "--cache", "store", "--method", "ld", "--shuffle", "shard"]) == 3
    assert "did you mean 'shards'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
