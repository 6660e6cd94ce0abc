"""Which images a run uses, how it reads them, and what it says of that before it starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kdcli.classes import ClassList
from kdcli.data.coco import Dataset, open_split
from kdcli.detectors.weights import export, load_detector
from kdcli.engine.caching.edit import merge
from kdcli.engine.caching.plan import plan_store
from kdcli.engine.caching.show import read_for_show
from kdcli.engine.caching.verify import plan_of_store
from kdcli.engine.loading.selection import as_stored, require_boxes_on, usable
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.teacher.forward import class_order
from kdcli.engine.training.setup import RunSetup, prepare
from kdcli.errors import DataError, OptionError, StoreError
from kdcli.files import atomic_save
from kdcli.store.manifest import read_manifest
from kdcli.structures import Canvas
from tests.support.small_runs import CANVAS, CLASSES, cache_options, run_request, write

Content = dict[str, Any]
Edit = Callable[[Content], None]
HALF = 2  # position of the image with a half turn


class Heard(NullReporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def edited(shapes: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the drawn set whose annotations were changed."""

    def make(edit: Edit, *splits: str) -> Path:
        root = tmp_path / "edited"
        shutil.copytree(shapes, root)
        for split in splits or ("train", "val"):
            file = root / "annotations" / f"{split}.json"
            content = json.loads(file.read_text())
            edit(content)
            file.write_text(json.dumps(content))
        return root

    return make


def _beyond(content: Content) -> None:
    """A box that runs 40 px over the border, on the first image that has one."""
    content["annotations"][0]["bbox"][2] += 40 + max(image["width"] for image in content["images"])


def _crowd(content: Content) -> None:
    for note in content["annotations"]:
        note["iscrowd"] = 1


def _prepared(root: Path, heard: Heard | None = None, command: str = "train", **changes: Any) -> RunSetup:
    request = run_request(command, root, **changes)
    return prepare(request.options(), frozenset(request.fields), heard or Heard())


def test_a_run_without_a_box_to_train_on_does_not_start(edited: Callable[..., Path], teacher: Path) -> None:
    root = edited(_crowd, "train")
    with pytest.raises(DataError, match=r"no box to train on: all .* crowd"):
        _prepared(root)
    with pytest.raises(DataError, match=r"no box to train on: all .* crowd"):
        plan_store(cache_options(root, teacher), NullReporter())


def test_a_val_split_without_ground_truth_is_said(edited: Callable[..., Path]) -> None:
    heard = Heard()
    _prepared(edited(_crowd, "val"), heard)
    assert any(line.startswith("warning: val: ") and "AP is not defined" in line for line in heard.lines)


def test_a_canvas_that_leaves_no_box_is_refused(shapes: Path) -> None:
    train = open_split(shapes, "train")
    positions = usable(train, False, NullReporter(), trains=True).positions
    heard = Heard()
    require_boxes_on(train, positions, Canvas(96, 128), heard)
    assert heard.lines == []
    boxes = train.annotations.boxes_xywh.copy()
    boxes[:, 2:] = 2
    small = replace(train, annotations=replace(train.annotations, boxes_xywh=boxes))
    with pytest.raises(
        DataError, match=f"{len(boxes)} of {len(boxes)} boxes have a side under 1 pixel on the canvas 32"
    ):
        require_boxes_on(small, positions, Canvas(32, 32), heard)
    boxes[::2, 2:] = 9
    require_boxes_on(small, positions, Canvas(32, 32), heard)
    assert "are not trained on" in heard.lines[0]


def test_a_shared_picture_is_said(shapes: Path, tmp_path: Path) -> None:
    root = tmp_path / "shared"
    shutil.copytree(shapes, root)
    first, second = (json.loads((root / "annotations" / f"{s}.json").read_text()) for s in ("train", "val"))
    one, other = first["images"][0], second["images"][0]
    shutil.copy(root / "train" / one["file_name"], root / "val" / other["file_name"])
    other |= {"height": one["height"], "width": one["width"]}
    second["annotations"] = [a for a in second["annotations"] if a["image_id"] != other["id"]]
    (root / "annotations" / "val.json").write_text(json.dumps(second))
    heard = Heard()
    _prepared(root, heard)
    assert any("1 x image of val that is in train too" in line for line in heard.lines)


@pytest.mark.full
def test_clipped_boxes_are_bound_to_store_and_run(edited: Callable[..., Path], teacher: Path, tmp_path: Path) -> None:
    root = edited(_beyond)
    with pytest.raises(DataError, match="--clip-boxes"):
        plan_store(cache_options(root, teacher), NullReporter())
    store = write(cache_options(root, teacher, method="ld", clip_boxes=True), tmp_path / "store")
    assert read_manifest(store).dataset.reading() == {"boxes": "clipped"}
    setup = _prepared(root, command="distill", cache=str(store), method="ld")  # not said again
    assert setup.options.clip_boxes
    assert (setup.train.clip, setup.val.clip) == (True, True)
    assert len(setup.positions) == setup.train.num_images
    plan = plan_of_store(store, str(root), str(teacher), None, NullReporter())
    assert plan.source.dataset.clip
    other = write(cache_options(root, teacher, method="ld", skip_bad=True), tmp_path / "other")
    with pytest.raises(StoreError, match="was written without 1 images of this run"):
        _prepared(root, command="distill", cache=str(other), method="ld", clip_boxes=True)
    with pytest.raises(StoreError, match=r"dataset\.boxes"):
        merge([store, other], tmp_path / "merged", None, NullReporter())


def _tag(data: Dataset, tags: dict[int, int]) -> None:
    """Give images, by position, EXIF orientations; their pixels stay as they are."""
    for i, tag in tags.items():
        with Image.open(data.image_path(i)) as image:
            pixels = image.convert("RGB")
        exif = Image.Exif()
        exif[0x0112] = tag
        pixels.save(data.image_path(i), exif=exif, quality=95)


@pytest.fixture
def stored_way(shapes: Path, tmp_path: Path) -> Path:
    """A set that was labelled on the pixels in its files: a quarter turn proves it for a half turn."""
    root = tmp_path / "stored_way"
    shutil.copytree(shapes, root)
    for split in ("train", "val"):
        data = open_split(root, split)
        first = next(i for i in range(data.num_images) if i != HALF and len(set(data.image_size(i))) == 2)
        _tag(data, {first: 6, HALF: 3})
    return root


@pytest.mark.full
def test_orientations_are_bound_to_store_and_run(stored_way: Path, teacher: Path, tmp_path: Path) -> None:
    heard = Heard()
    setup = _prepared(stored_way, heard)
    assert (setup.train.exif, setup.val.exif, setup.options.exif) == (False, False, "auto")
    assert sum("half turn" in line for line in heard.lines) == 2
    plain, turned = (setup.source.load((HALF, "identity")).image, replace_exif(setup).load((HALF, "identity")).image)
    assert not torch.equal(plain, turned)
    store = write(cache_options(stored_way, teacher, method="ld", cache_images=True), tmp_path / "store")
    assert read_manifest(store).dataset.reading() == {"exif": "ignored"}
    run = {"command": "distill", "cache": str(store), "method": "ld"}
    again = _prepared(stored_way, **run)
    assert torch.equal(again.source.load((HALF, "identity")).image, plain)
    with pytest.raises(StoreError, match="exif: store ignored, here None"):
        _prepared(stored_way, **{**run, "cache": str(written_bare(stored_way, teacher, tmp_path)), "exif": "apply"})
    assert not plan_of_store(store, str(stored_way), str(teacher), None, NullReporter()).source.dataset.exif
    bare = written_bare(stored_way, teacher, tmp_path)
    shown = read_for_show(bare, None, setup.train.image_id(HALF), "identity")
    assert torch.equal(shown.image, plain)


def replace_exif(setup: RunSetup) -> Any:
    """The samples of a run that applies every orientation that sizes allow."""
    return replace(setup.source, dataset=replace(setup.train, exif=True))


def written_bare(root: Path, teacher: Path, folder: Path) -> Path:
    """A store without images."""
    out = folder / "bare"
    return out if out.exists() else write(cache_options(root, teacher, method="ld"), out)


def test_a_store_of_a_set_read_as_ever_says_nothing(lossless_store: Path, shapes: Path) -> None:
    record = read_manifest(lossless_store).dataset
    assert record.reading() == {}
    assert set(record.to_json()) == {"annotations_sha256", "categories", "num_images", "split", "left_out"}
    assert as_stored(open_split(shapes, "train"), record).reading() == {}


def test_a_checkpoint_with_two_classes_of_one_name_is_refused(teacher: Path, tmp_path: Path) -> None:
    detector, _ = load_detector(teacher)
    twins = ClassList.numbered([*CLASSES[:-1], CLASSES[0]])
    atomic_save(export(detector, twins, CANVAS, {}), tmp_path / "twins.pt")
    with pytest.raises(OptionError, match=r"2 classes have the name 'circle' \(ids 1 and 8\)") as caught:
        load_detector(tmp_path / "twins.pt")
    assert "\n" not in str(caught.value)


def test_a_name_that_looks_like_the_teachers_is_pointed_at() -> None:
    known = ClassList.numbered(["Dog", "cat"])
    assert class_order(known, ClassList.numbered(["cat", "Dog"])) == (1, 0)
    with pytest.raises(DataError, match="letter by letter: 'Dog' is not 'dog '"):
        class_order(known, ClassList.numbered(["cat", "dog "]))


def test_a_manifest_with_a_name_twice_is_refused(lossless_store: Path) -> None:
    record = read_manifest(lossless_store).dataset
    data = record.to_json()
    data["categories"][1][1] = data["categories"][0][1]
    with pytest.raises(ValueError, match="impossible categories"):
        type(record).from_json(data)
