"""``kdcli predict`` on folders as people have them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kdcli.cli.main import run
from kdcli.engine.evaluation.predict import image_files, require_images
from kdcli.errors import DataError
from tests.support.wild_pictures import encoded, readable_pictures, unreadable_pictures, with_orientation


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_hidden_files_and_what_is_no_file_are_left_out(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = {
        "._a.jpg": b"\x00\x05\x16\x07",
        ".b.png": b"",
        ".DS_Store": b"\0\0\0\1Bud1",
        "Thumbs.db": b"\xd0\xcf\x11\xe0",
    }
    source = fill(
        tmp_path / "photos", {"a.jpg": encoded("JPEG"), "b.gif": readable_pictures()["animated.gif"], **hidden}
    )
    (source / "c.jpg").mkdir()
    os.mkfifo(source / "d.jpg")
    assert run(["predict", str(teacher), str(source), "--out", str(tmp_path / "drawn"), "--score", "0", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [Path(entry["image"]).name for entry in json.loads(out)["images"]] == ["a.jpg", "b.gif"]
    assert "left out 4 names in" in err
    assert "1 image of several frames or pages: the first was taken" in err
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "._a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="holds no images"):
        image_files(tmp_path / "none")


@pytest.mark.filterwarnings("ignore")  # Pillow's, which kdcli.data.images switches off
def test_odd_pictures(tmp_path: Path) -> None:
    folder = fill(tmp_path / "odd", readable_pictures())
    files, left_out = image_files(folder)
    assert (len(files), left_out) == (len(readable_pictures()), 0)
    assert require_images(files) == 4  # a GIF, a WebP, a PNG, a TIFF; a phone's second picture is a preview


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(unreadable_pictures()))
def test_what_is_no_picture_is_named(name: str, tmp_path: Path) -> None:
    data, words = unreadable_pictures()[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        require_images([tmp_path / name])
    said = str(caught.value)
    assert words in said
    assert said.startswith(f"image {tmp_path / name} ")


@pytest.mark.filterwarnings("ignore")
def test_all_bad_pictures_are_counted(tmp_path: Path) -> None:
    bad = {name: data for name, (data, _) in unreadable_pictures().items()}
    files, _ = image_files(fill(tmp_path / "bad", bad | {"good.jpg": with_orientation(2, b"left\0")}))
    with pytest.raises(
        DataError, match=rf"^{len(bad)} images of {len(bad) + 1} cannot be read, the first: image .*bomb\.png"
    ):
        require_images(files)
