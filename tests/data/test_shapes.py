"""The drawn demo set: deterministic, sound, varied, and never over somebody else's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdcli.data import shapes
from kdcli.data.check import check_dataset
from kdcli.data.coco import open_split
from kdcli.data.shapes import CLASSES, draw_image, make_shapes
from kdcli.errors import DataError, OptionError


def _bytes(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_shapes(tmp_path / name, num_train=3, num_val=2, seed=seed)
    first = _bytes(tmp_path / "a")
    assert sorted(first) == [
        *("annotations/train.json", "annotations/val.json", "shapes.json"),
        *("train/00000.jpg", "train/00001.jpg", "train/00002.jpg", "val/00000.jpg", "val/00001.jpg"),
    ]
    assert first == _bytes(tmp_path / "b")
    assert first["train/00000.jpg"] != _bytes(tmp_path / "c")["train/00000.jpg"]
    assert first["train/00000.jpg"] != first["val/00000.jpg"]


def test_the_set_is_sound_and_varied(tmp_path: Path) -> None:
    make_shapes(tmp_path, num_train=60, num_val=1)
    dataset = open_split(tmp_path, "train")
    report = check_dataset(dataset)
    assert (report.faults, report.warnings) == ((), ())
    notes = dataset.annotations
    assert [c.name for c in dataset.classes] == list(CLASSES)
    assert set(notes.category.tolist()) == set(range(len(CLASSES)))
    sides = notes.boxes_xywh[:, 2:].max(axis=1)
    assert sides.min() < 12
    assert sides.max() > 80
    assert (notes.heights > notes.widths).any()
    assert (notes.heights < notes.widths).any()
    assert (notes.area <= notes.boxes_xywh[:, 2] * notes.boxes_xywh[:, 3]).all()


def test_boxes_are_tight_around_what_can_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Painted with its number alone, each shape is seen exactly inside its box."""
    painted: list[int] = []

    def number(rng: np.random.Generator, target: shapes.Pixels, alpha: shapes.Pixels, label: int) -> None:
        painted.append(len(painted) + 1)
        target[(alpha >= 0.5)[:, :, 0]] = painted[-1]

    monkeypatch.setattr(shapes, "_paint", number)
    monkeypatch.setattr(shapes, "_grain", lambda rng, shape: np.zeros(shape, dtype=np.float32))
    monkeypatch.setattr(shapes, "_background", lambda rng, h, w: np.zeros((h, w, 3), dtype=np.float32))
    for seed in range(40):
        painted.clear()
        rng = np.random.Generator(np.random.PCG64(seed))
        pixels, boxes = draw_image(rng, (96, 128))
        assert len(boxes) == len(painted)
        for label, box in enumerate(boxes, 1):
            ys, xs = np.nonzero(pixels[:, :, 0] == label)
            x, y, w, h = box["bbox"]
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x, y, x + w, y + h)
            assert box["area"] == len(xs)


def test_a_complete_set_is_left_and_an_interrupted_one_finished(tmp_path: Path) -> None:
    make_shapes(tmp_path, num_train=3, num_val=2)
    whole = _bytes(tmp_path)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.jpg")}
    make_shapes(tmp_path, num_train=3, num_val=2)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.jpg")}
    (tmp_path / "annotations" / "val.json").unlink()
    (tmp_path / "train" / "00001.jpg").unlink()
    make_shapes(tmp_path, num_train=3, num_val=2)
    assert _bytes(tmp_path) == whole


def test_other_files_are_never_overwritten(tmp_path: Path) -> None:
    make_shapes(tmp_path / "a", num_train=1, num_val=1)
    with pytest.raises(DataError, match="not empty"):
        make_shapes(tmp_path / "a", num_train=2, num_val=1)
    (tmp_path / "b").mkdir()
    make_shapes(tmp_path / "b", num_train=1, num_val=1)  # an empty folder will do
    (tmp_path / "c").write_text("mine")
    for target in (tmp_path, tmp_path / "c"):
        with pytest.raises(DataError, match="choose an empty folder"):
            make_shapes(target, num_train=1, num_val=1)


@pytest.mark.parametrize("wrong", [{"num_train": 0}, {"num_val": 0}, {"seed": -1}, {"size": (10, 20)}])
def test_impossible_numbers(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="shapes"):
        make_shapes(tmp_path / "x", **wrong)  # type: ignore[arg-type]
