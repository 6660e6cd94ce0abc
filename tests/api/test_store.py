"""A store in somebody else's loop: views, pixels, boxes, batches, and what is refused."""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import multiprocessing
from torch.utils.data import DataLoader, Dataset

import kdcli
from kdcli.data.coco import open_split
from kdcli.engine.caching.plan import plan_store
from kdcli.engine.loading.samples import SampleSource
from kdcli.engine.runtime.progress import NullReporter
from tests.support.selection import matrix
from tests.support.small_runs import cache_options, write

KEYS = [(3, "identity"), (3, "hflip"), (7, "hflip")]


@pytest.fixture(scope="module")
def source(shapes: Path, teacher: Path) -> SampleSource:
    """The samples that the stores were written from."""
    return plan_store(cache_options(shapes, teacher), NullReporter()).source


@pytest.fixture(scope="module")
def with_images(shapes: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the canvases."""
    options = cache_options(shapes, teacher, method="rm", cache_images=True)
    return write(options, tmp_path_factory.mktemp("with_images") / "store")


def test_what_a_store_says(default_store: Path, shapes: Path) -> None:
    store = kdcli.open_store(default_store, "rm,pfi")
    assert store.path == str(default_store)
    assert store.classes == tuple(c.name for c in open_split(shapes, "train").classes)
    assert store.image_ids == tuple(range(1, 25))
    assert store.views == ("identity", "hflip")
    assert store.canvas.size == (96, 128)
    assert [need.key for need in store.needs] == ["cls_logits@all", "features@all", "rank@main"]
    assert store.read([(3, "hflip")]).tensors.keys() == {need.key for need in store.needs}
    everything = kdcli.open_store(str(default_store)).read([(3, "hflip")])
    assert {"box_distribution@main+vlr", "cls_logits@main", "features@all"} < everything.tensors.keys()
    assert repr(store) == f"<Store {default_store}: 24 images, views identity, hflip>"


def test_views_give_the_teachers_pixels_and_boxes(default_store: Path, source: SampleSource) -> None:
    store = kdcli.open_store(default_store)
    for image_id, name in KEYS:
        item = (source.dataset.index_of(image_id), name)
        sample, path = source.load(item), source.dataset.image_path(item[0])
        view = store.view(image_id, name)
        assert view.geometry == sample.geometry
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
            assert torch.equal(view.render(image), sample.image)
        assert torch.equal(view.render(pixels), sample.image)
        assert torch.equal(view.render(torch.from_numpy(pixels).permute(2, 0, 1)), sample.image)
        assert torch.equal(view.load(path), sample.image)
        boxes, labels = source.dataset.training_boxes(item[0])
        placed, keep = view.boxes(boxes)
        assert torch.equal(placed[keep], sample.boxes)
        assert torch.equal(view.boxes(boxes.tolist())[0], placed)
        assert torch.allclose(view.to_image(placed), torch.from_numpy(boxes), atol=1e-3)
        batch = store.read([(image_id, name)], targets=[(boxes, labels)])
        assert torch.equal(batch.boxes[0], sample.boxes)
        assert torch.equal(batch.labels[0], sample.labels)
        assert torch.equal(batch.valid[0], sample.valid)


def test_exif_orientation_follows_the_record(default_store: Path, source: SampleSource) -> None:
    """A picture that lies on its side, with the mark that says so, is the upright one."""
    position = source.dataset.index_of(3)
    view = kdcli.open_store(default_store).view(3)
    with Image.open(source.dataset.image_path(position)) as image:
        upright = image.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, "png", exif=exif)
    with Image.open(turned) as image:
        assert image.size == upright.size[::-1]
        assert torch.equal(view.render(image), view.render(upright))


def test_wrong_pixels_are_refused(default_store: Path, source: SampleSource, tmp_path: Path) -> None:
    view = kdcli.open_store(default_store).view(3)
    height, width = view.geometry.height, view.geometry.width
    for value, message in (
        (torch.zeros(3, height, width), f"float32 \\[3, {height}, {width}\\] is no image"),
        (np.zeros((height, width), np.uint8), "is no image; give \\[h, w, 3\\]"),
        (torch.zeros(3, height + 1, width, dtype=torch.uint8), "but its view was made for"),
        (Image.new("RGB", (width + 1, height)), "image of image 3, view identity is"),
    ):
        with pytest.raises(kdcli.DataError, match=message):
            view.render(value)
    other = tmp_path / "other.png"
    Image.new("RGB", (width, height)).save(other)
    with pytest.raises(kdcli.StoreError, match=r"other.png is not the image file that the teacher saw"):
        view.load(other)
    with pytest.raises(kdcli.MissingPathError):
        view.load(tmp_path / "none.png")
    with pytest.raises(kdcli.DataError, match=r"give \[G, 4\]"):
        view.boxes(torch.zeros(2, 5))


def test_images_come_from_the_store_or_the_data(
    with_images: Path, default_store: Path, shapes: Path, source: SampleSource
) -> None:
    from_store, from_files = kdcli.open_store(with_images), kdcli.open_store(default_store, data=shapes)
    for image_id, name in KEYS:
        expected = source.load((source.dataset.index_of(image_id), name)).image
        assert torch.equal(from_store.image(image_id, name), expected)
        assert torch.equal(from_files.image(image_id, name), expected)
    with pytest.raises(kdcli.OptionError, match=r"has no images .*: give data= to open_store"):
        kdcli.open_store(default_store).image(3)


def test_batches_are_of_one_orientation(default_store: Path, shapes: Path) -> None:
    store = kdcli.open_store(default_store, "rm")
    both = {store.orientation(i).size: i for i in store.image_ids}
    assert both.keys() == {(96, 128), (128, 96)}
    with pytest.raises(kdcli.OptionError, match=r"image \d+, view hflip has a canvas 96x128, .* 128x96; group them"):
        store.read([(both[96, 128], "hflip"), (both[128, 96], "identity")])
    for epoch in range(3):
        batches = store.batches(5, seed=4, epoch=epoch)
        assert sorted(i for batch in batches for i, _ in batch) == list(store.image_ids)
        for batch in batches:
            assert len({store.orientation(*key).size for key in batch}) == 1
            assert len(batch) <= 5
    assert store.batches(5, epoch=1) == kdcli.open_store(default_store, data=shapes).batches(5, epoch=1)
    assert store.batches(5, epoch=1) != store.batches(5, epoch=2)


def test_other_boxes_are_refused(default_store: Path, shapes: Path) -> None:
    store = kdcli.open_store(default_store, "rm")
    boxes, labels = open_split(shapes, "train").training_boxes(2)
    assert store.read([(3, "identity")], targets=[(boxes, labels)]).labels
    for wrong in ((boxes + 1, labels), (boxes[:-1], labels[:-1]), (boxes[::-1].copy(), labels[::-1].copy())):
        with pytest.raises(kdcli.StoreError, match=r"image 3, view identity: its boxes or labels are not those"):
            store.read([(3, "identity")], targets=[wrong])
    with pytest.raises(kdcli.OptionError, match=r"^boxes: the boxes of this batch are not known"):
        _ = store.read([(3, "identity")]).boxes


def test_what_cannot_be_opened_or_read(default_store: Path, shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(kdcli.MissingPathError):
        kdcli.open_store(tmp_path / "none")
    with pytest.raises(kdcli.OptionError, match="did you mean 'pfi'"):
        kdcli.open_store(default_store, "pfii")
    with pytest.raises(kdcli.OptionError, match="options of 'ld' are not used"):
        kdcli.open_store(default_store, "rm", {"ld": {"imitation": "gi"}})
    with pytest.raises(kdcli.StoreError, match=r"lacks boxes@all"):
        kdcli.open_store(default_store, "ld", {"ld": {"imitation": "gi"}})
    other = tmp_path / "other"
    shutil.copytree(shapes, other)
    annotations = other / "annotations" / "train.json"
    annotations.write_text(annotations.read_text().replace('"star"', '"sun"'))
    with pytest.raises(kdcli.StoreError, match=r"does not belong to this run: dataset.annotations_sha256"):
        kdcli.open_store(default_store, data=other)
    store = kdcli.open_store(default_store, ["rm"])
    with pytest.raises(kdcli.StoreError, match="has no row for image 99"):
        store.read([(99, "identity")])
    with pytest.raises(kdcli.StoreError, match="has no view 'crop-0'; it has identity, hflip"):
        store.view(3, "crop-0")
    with pytest.raises(kdcli.OptionError, match="a batch needs at least one"):
        store.read([])
    with pytest.raises(kdcli.OptionError, match=r"'gpu' is not a device"):
        store.read([(3, "identity")], device="gpu")


class Batches(Dataset[kdcli.StoredRows]):
    """One batch of rows an item, as a data worker reads them."""

    def __init__(self, store: kdcli.Store, batches: list[list[tuple[int, str]]]) -> None:
        self.store, self.batches = store, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> kdcli.StoredRows:
        return self.store.fetch(self.batches[index])


@pytest.mark.parametrize("start", matrix(["fork", "spawn"]))
def test_workers_read_what_the_parent_reads(start: str, default_store: Path, shapes: Path) -> None:
    assert start in multiprocessing.get_all_start_methods()
    store = kdcli.open_store(default_store, "ld,pfi", data=shapes)
    batches = store.batches(4)
    ours = [store.read(keys) for keys in batches]  # a store that was used: it has open files
    loader = DataLoader(Batches(store, batches), batch_size=None, num_workers=1, multiprocessing_context=start)
    for rows, mine in zip(loader, ours, strict=True):
        theirs = store.decode(rows)
        assert theirs.keys == mine.keys
        assert theirs.tensors.keys() == mine.tensors.keys()
        assert all(torch.equal(theirs.tensors[key], value) for key, value in mine.tensors.items())
        assert all(torch.equal(a, b) for a, b in zip(theirs.boxes, mine.boxes, strict=True))
        assert theirs.entries is not None
        assert mine.entries is not None
        assert torch.equal(theirs.entries.index, mine.entries.index)


def test_a_store_travels_light(default_store: Path) -> None:
    store = kdcli.open_store(default_store, "pfi")
    before = len(pickle.dumps(store))
    store.read(store.batches(4)[0])
    assert len(pickle.dumps(store)) < before + 3000  # the orientations that were looked up
