"""``--cache-images``: the same pixels and the same training as from the files, without the files; every command that
changes a store keeps them, and a store without them is what it was."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdcli.cli.main import run
from kdcli.data.shapes import make_shapes
from kdcli.data.views import PAD_RGB
from kdcli.engine.caching import add as add_module
from kdcli.engine.caching import edit as edit_module
from kdcli.engine.caching import write as write_module
from kdcli.engine.caching.estimate.estimate import estimate
from kdcli.engine.caching.plan import plan_store
from kdcli.engine.caching.verify import plan_of_store, verify_checksums, verify_teacher
from kdcli.engine.caching.write import write_store
from kdcli.engine.loading.loader import Loader
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.teacher.forward import TeacherForward
from kdcli.engine.training import launch
from kdcli.engine.training.setup import prepare
from kdcli.errors import DataError, OptionError, StoreError
from kdcli.store.arrays import shard_key
from kdcli.store.image_codec import PIXELS, decode_pixels, encode_pixels
from kdcli.store.info import store_info
from kdcli.store.manifest import read_manifest
from kdcli.store.reader import StoreReader
from kdcli.store.schema import StoreSchema
from kdcli.structures import Batch, RowKey
from tests.support.files import contents
from tests.support.selection import matrix
from tests.support.small_runs import cache_options, run_request, write
from tests.support.traces import run_setup, trace


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training images of either orientation, 2 for validation."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes(root, num_train=12, num_val=2, seed=3, size=(96, 160))
    return root


@pytest.fixture(scope="module")
def plain(data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without images."""
    return write(cache_options(data, teacher, method="ld,rm"), tmp_path_factory.mktemp("stores") / "plain")


@pytest.fixture(scope="module")
def with_images(data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store with them."""
    return write(
        cache_options(data, teacher, method="ld,rm", cache_images=True),
        tmp_path_factory.mktemp("stores") / "with_images",
    )


@pytest.fixture(scope="module")
def bare(data: Path, with_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set without a single training image; made after the store was written."""
    assert with_images.exists()
    root = Path(shutil.copytree(data, tmp_path_factory.mktemp("bare") / "shapes"))
    for file in (root / "train").iterdir():
        file.unlink()
    return root


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (1, 5), (7, 1)])
def test_pixels_come_back_whatever_they_are(size: tuple[int, int]) -> None:
    draw = np.random.default_rng(3)
    noise = draw.integers(0, 256, (3, *size), np.uint8)
    for image in (noise, np.zeros_like(noise), np.full_like(noise, 255), noise // 255 * 255):
        before = image.copy()
        codes = encode_pixels(image)
        assert codes.shape == (3, size[0] * size[1])
        np.testing.assert_array_equal(image, before)
        np.testing.assert_array_equal(decode_pixels(codes, size), before, strict=True)
    padding = np.broadcast_to(np.array(PAD_RGB, np.uint8)[:, None, None], (3, *size))
    assert np.count_nonzero(encode_pixels(padding)[:, size[1] :]) == 0


def test_a_store_without_images_is_what_it_was(plain: Path, with_images: Path) -> None:
    ours, theirs = contents(plain), contents(with_images)
    assert not any(PIXELS in path for path in ours)
    assert "images" not in read_manifest(plain).schema.to_json()
    assert read_manifest(plain).to_json()["version"] == read_manifest(with_images).to_json()["version"] == 2
    changed = {k for k in ours if ours[k] != theirs[k]}
    assert changed == {"zarr.json", *(k for k in ours if k.startswith("journal/"))}
    assert {k for k in theirs if k not in ours} == {
        f"{PIXELS}/zarr.json", *(shard_key(StoreReader(with_images).layout[PIXELS], s) for s in range(3))
    }  # fmt: skip


def test_zarr_alone_reads_the_images(with_images: Path, data: Path) -> None:
    import zarr

    reader = StoreReader(with_images)
    key = RowKey(reader.image_ids[1], "hflip")
    group: Any = zarr.open_group(str(with_images), mode="r")
    row = reader.row_index(key)
    height, width = group["row/geometry"][row][-2:].astype(int)
    image = np.cumsum(group["row/image"][row].reshape(3, height, width), axis=1, dtype="uint8")
    image[[0, 2]] += image[1]
    ours = reader.read(key).image
    assert ours is not None
    np.testing.assert_array_equal(image, ours, strict=True)
    through = StoreReader(with_images, direct=False).read(key).image
    assert through is not None
    np.testing.assert_array_equal(through, ours, strict=True)


def batches(store: Path, root: Path) -> Iterator[Batch]:
    """Every row, one a batch."""
    run = run_setup(root, "ld,rm", cache=str(store))
    yield from Loader(run.source, 0).batches([[(int(p), v)] for v in run.views for p in run.positions])


def test_every_row_has_the_same_pixels_bit_for_bit(plain: Path, with_images: Path, data: Path, bare: Path) -> None:
    sizes = set()
    for ours, theirs in zip(batches(plain, data), batches(with_images, bare), strict=True):
        assert ours.keys == theirs.keys
        assert ours.images.dtype == theirs.images.dtype
        assert torch.equal(ours.images, theirs.images)
        assert all(torch.equal(ours.rows[k], theirs.rows[k]) for k in ours.rows)
        sizes.add(tuple(ours.images.shape[-2:]))
    assert sizes == {(96, 128), (128, 96)}


def test_training_is_the_same_without_the_files(
    plain: Path, with_images: Path, data: Path, bare: Path, tmp_path: Path
) -> None:
    from_files = trace(run_setup(data, "ld,rm", cache=str(plain)), tmp_path, 3)
    from_store = trace(run_setup(bare, "ld,rm", cache=str(with_images)), tmp_path, 3)
    assert from_files[0] == from_store[0]
    assert all(torch.equal(value, from_store[1][name]) for name, value in from_files[1].items())
    with pytest.raises(DataError, match="missing image"):
        run_setup(bare, "ld,rm", cache=str(plain))


@pytest.mark.parametrize("workers", matrix([0, 2]))
def test_a_whole_run_needs_the_val_images_alone(with_images: Path, bare: Path, tmp_path: Path, workers: int) -> None:
    fields = run_request("distill", bare, cache=str(with_images), method="ld", epochs=1, workers=workers)
    _, metrics = launch.start(fields, tmp_path / "run", NullReporter(), overwrite=False)
    assert metrics["epochs"] == 1
    assert metrics["ap"] is not None


def test_other_boxes_are_still_refused(with_images: Path, bare: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(bare, tmp_path / "shapes"))
    notes = json.loads((root / "annotations" / "train.json").read_text())
    notes["annotations"][0]["bbox"][2] -= 1
    (root / "annotations" / "train.json").write_text(json.dumps(notes))
    with pytest.raises(StoreError, match="annotations_sha256"):
        run_setup(root, "ld", cache=str(with_images))
    # and by the row's own guard, where the files of the annotations are not compared
    run = run_setup(bare, "ld", cache=str(with_images))
    position = next(int(p) for p in run.positions if len(run.train.training_boxes(int(p))[0]))
    run.train.annotations.boxes_xywh[run.train.annotations.box_offsets[position], 2] -= 1
    with pytest.raises(StoreError, match="boxes, labels or regions"):
        run.source.load((position, "identity"))


def test_bad_images_are_those_of_the_writing(data: Path, teacher: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(data, tmp_path / "shapes"))
    files = sorted((root / "train").iterdir())
    files[3].write_bytes(b"no image")
    store = write(cache_options(root, teacher, method="rm", cache_images=True, skip_bad=True), tmp_path / "store")
    before = run_setup(root, "rm", cache=str(store), skip_bad=True)
    for file in files:
        file.unlink()
    after = run_setup(root, "rm", cache=str(store), skip_bad=True)
    assert len(after.positions) == 11
    np.testing.assert_array_equal(after.positions, before.positions)
    with pytest.raises(StoreError, match="train with --skip-bad too"):
        run_setup(root, "rm", cache=str(store))


def test_flipped_bits_of_images_are_found(with_images: Path, data: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(with_images, tmp_path / "store"))
    files, _ = verify_checksums(store, NullReporter())
    assert files == 3 * len(StoreReader(store).layout)
    file = store / shard_key(StoreReader(store).layout[PIXELS], 0)
    content = file.read_bytes()
    draw = np.random.default_rng(1)
    for position in draw.integers(0, len(content), 20):
        changed = bytearray(content)
        changed[int(position)] ^= 1 << int(draw.integers(8))
        file.write_bytes(changed)
        with pytest.raises(StoreError, match="is not what was written"):
            verify_checksums(store, NullReporter())
        reader = StoreReader(store)
        with pytest.raises(StoreError, match=r"fails the checksum|broken index"):  # noqa: PT012
            for row in range(10):
                reader.read(RowKey(reader.image_ids[row // 2], reader.views[row % 2]))


def test_verify_with_the_teacher_compares_the_images(
    with_images: Path, data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(store: Path) -> int:
        plan = plan_of_store(store, str(data), str(teacher), None, NullReporter())
        return verify_teacher(plan, store, 4, NullReporter())[0]

    assert again(with_images) == 4
    monkeypatch.setattr(write_module, "encode_pixels", lambda image: encode_pixels(255 - image))
    wrong = write(cache_options(data, teacher, method="rm", cache_images=True), tmp_path / "wrong")
    with pytest.raises(StoreError, match="stored pixels are not those of its image file"):
        again(wrong)


def test_added_tensors_leave_the_images(with_images: Path, data: Path, teacher: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(with_images, tmp_path / "store"))
    whole = write(cache_options(data, teacher, method="ld,rm,pfi", cache_images=True), tmp_path / "whole")
    assert add_module.add(store, None, None, "pfi", {}, "default", NullReporter()) == [
        "cls_logits@all",
        "features@all",
    ]
    assert contents(store) == contents(whole)
    verify_checksums(store, NullReporter())


@pytest.mark.parametrize("methods", matrix(["", "pfi"]))
def test_added_images_are_those_of_one_writing(
    plain: Path, data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: str
) -> None:
    store = Path(shutil.copytree(plain, tmp_path / "store"))
    whole = write(
        cache_options(data, teacher, method=f"ld,rm,{methods}".rstrip(","), cache_images=True), tmp_path / "whole"
    )
    if not methods:  # the teacher has nothing to say
        monkeypatch.setattr(TeacherForward, "rows", lambda *_: pytest.fail("a forward pass"))
    tensors = ["cls_logits@all", "features@all"] if methods else []
    assert add_module.add(store, None, None, methods, {}, "default", NullReporter(), images=True) == [*tensors, PIXELS]
    assert contents(store) == contents(whole)
    verify_checksums(store, NullReporter())
    assert add_module.add(store, None, None, methods, {}, "default", NullReporter(), images=True) == []


def test_pruned_images_leave_the_store_without_them(plain: Path, with_images: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(with_images, tmp_path / "store"))
    assert edit_module.prune_tensors(store, [PIXELS], NullReporter()) == [PIXELS]
    assert contents(store) == contents(plain)
    with pytest.raises(OptionError, match="has no row/image"):
        edit_module.prune_tensors(store, [PIXELS], NullReporter())
    kept = Path(shutil.copytree(with_images, tmp_path / "kept"))
    edit_module.prune_tensors(kept, ["rank@main"], NullReporter())
    assert StoreReader(kept).schema.images
    verify_checksums(kept, NullReporter())


def test_images_go_through_merge_and_views(
    with_images: Path, plain: Path, data: Path, teacher: Path, tmp_path: Path
) -> None:
    def one(view: str, name: str, images: bool) -> Path:
        options = cache_options(data, teacher, method="ld,rm", views=view, cache_images=images)
        return write(options, tmp_path / name)

    sides = [one("identity", "identity", True), one("hflip", "hflip", True)]
    both = tmp_path / "both"
    assert edit_module.merge(sides, both, None, NullReporter()) == 24
    files = [k for k in contents(with_images) if k.startswith("row/")]
    assert [contents(both)[k] for k in files] == [contents(with_images)[k] for k in files]
    without = one("hflip", "without", False)
    for pair in ([sides[0], without], [without, sides[0]]):
        with pytest.raises(StoreError, match=r"do not go together: schema\.images"):
            edit_module.merge(pair, tmp_path / "mixed", None, NullReporter())
    assert edit_module.prune_views(with_images, ["hflip"], tmp_path / "less", NullReporter()) == 12
    assert [contents(tmp_path / "less")[k] for k in files if k in contents(sides[0])] == [
        contents(sides[0])[k] for k in files if k in contents(sides[0])
    ]


def test_a_store_is_not_continued_the_other_way(
    plain: Path, with_images: Path, data: Path, teacher: Path, tmp_path: Path
) -> None:
    for store, images in ((plain, True), (with_images, False)):
        plan = plan_store(cache_options(data, teacher, method="ld,rm", cache_images=images), NullReporter())
        with pytest.raises(StoreError, match=r"schema\.images: store"):
            write_store(plan, store, NullReporter())
    # a killed writing with images goes on
    broken = Path(shutil.copytree(with_images, tmp_path / "broken"))
    (broken / "journal" / "000002.json").unlink()
    write(cache_options(data, teacher, method="ld,rm", cache_images=True), broken)
    assert contents(broken) == contents(with_images)


def test_what_a_store_with_images_takes(
    plain: Path, with_images: Path, data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = store_info(with_images)
    size = sum(f.stat().st_size for f in (with_images / "row" / "image" / "c").rglob("*") if f.is_file())
    assert info["images"] == {"encoding": "row_differences", "bytes": size}
    assert store_info(plain)["images"] is None
    assert run(["cache", "info", str(with_images)]) == 0
    assert f"{PIXELS}  " in capsys.readouterr().err
    plan = plan_store(cache_options(data, teacher, method="ld,rm", cache_images=True), NullReporter())
    guess = estimate(plan, tmp_path / "store").bytes_by_array[PIXELS]
    assert abs(guess - size) < 0.3 * size


def test_an_encoding_of_a_newer_kdcli_is_refused(with_images: Path) -> None:
    schema = read_manifest(with_images).schema.to_json()
    assert StoreSchema.from_json(schema).images
    for wrong in ("jpeg_xl", 7, True, {}):
        with pytest.raises(StoreError, match="unknown encoding of images"):
            StoreSchema.from_json({**schema, "images": wrong})


def test_images_of_any_pillow_mode(data: Path, teacher: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(data, tmp_path / "shapes"))
    file = sorted((root / "train").iterdir())[0]
    with Image.open(io.BytesIO(file.read_bytes())) as image:
        noise = np.random.default_rng(0).integers(0, 256, (image.height, image.width), np.uint8)
    Image.fromarray(noise).save(file, format="PNG")  # grey
    store = write(cache_options(root, teacher, method="rm", cache_images=True), tmp_path / "store")
    fields = run_request("distill", root, cache=str(store), method="rm")
    made = prepare(fields.options(), frozenset(fields.fields), NullReporter())
    plan = plan_store(cache_options(root, teacher, method="rm"), NullReporter())
    for view in made.views:
        assert torch.equal(made.source.load((0, view)).image, plan.source.load((0, view)).image)
