"""What stands where weights should be is named, in one line with what to do, wherever weights are read."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from kdcli.detectors.backbones import Backbone, load_backbone_weights
from kdcli.detectors.convert.file import convert_file
from kdcli.detectors.weights import load_detector
from kdcli.errors import OptionError
from kdcli.files import Inert, load_torch
from kdcli.filetypes import name_bytes
from tests.support.wild_weights import foreign_files, message_hub, of_pickle, saved

FILES = foreign_files()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone("shufflenet_v2_x0_5")


@pytest.mark.parametrize("name", sorted(FILES))
def test_what_is_no_weights_is_named(name: str, backbone: Backbone, tmp_path: Path) -> None:
    data, words = FILES[name]
    file = tmp_path / "model.pth"
    file.write_bytes(data)
    readers = (
        lambda: load_detector(file),
        lambda: load_backbone_weights(backbone, str(file)),
        lambda: convert_file(file, "mmdet", "64x96"),
        lambda: convert_file(file, "torchvision", "64x96", model="fcos_resnet50_fpn"),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in readers:
        with pytest.raises(OptionError) as caught:
            read()
        said = str(caught.value)
        assert words in said
        assert str(file) in said
        assert said.isprintable()
        assert len(said) < 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # kilobytes: 128 MB for a bomb of 256


def test_what_other_libraries_put_beside_weights_is_inert(tmp_path: Path) -> None:
    for old in (False, True):
        (tmp_path / "a.pth").write_bytes(saved({"w": torch.ones(2), "hub": message_hub()}, old=old))
        found = load_torch(tmp_path / "a.pth", what="file", foreign=True)
        assert torch.equal(found["w"], torch.ones(2))
        buffer = found["hub"]["log_scalars"]["loss"]
        assert type(buffer) is Inert
        assert vars(buffer) == {}
        with pytest.raises(OptionError, match="it holds mmengine"):
            load_torch(tmp_path / "a.pth", what="checkpoint")  # of kdcli, which writes none


def test_a_name_in_a_pickle_is_never_looked_up(tmp_path: Path) -> None:
    """Even the ones that are let through: getattr(getattr, "__call__") gives an inert object, not a method."""
    program = b"\x80\x02cbuiltins\ngetattr\ncbuiltins\ngetattr\nX\x08\x00\x00\x00__call__\x86R."
    (tmp_path / "a.pth").write_bytes(of_pickle(program))
    assert type(load_torch(tmp_path / "a.pth", what="file", foreign=True)) is Inert
    with pytest.raises(OptionError, match=r"it holds getattr, and kdcli makes no objects"):
        load_torch(tmp_path / "a.pth", what="file")


def test_sizes_that_lie_take_no_memory(tmp_path: Path) -> None:
    """A pickle may call a few constructors of PyTorch with any number."""
    huge = b"\x8a\x05\x00\x00\x00\x00\x40"  # 2**38
    for made in (b"cbuiltins\nbytearray\n", b"ctorch\nTensor\n"):
        (tmp_path / "a.pth").write_bytes(of_pickle(b"\x80\x02" + made + huge + b"\x85R."))
        with pytest.raises(OptionError, match="not a PyTorch file of plain tensors, or torn"):
            load_torch(tmp_path / "a.pth", what="file")


def test_known_bytes() -> None:
    assert name_bytes(b"", 0) == ("an empty file", "copy it again")
    assert name_bytes(b"\x00\x00\x00\x18ftypheic", 99) == ("a picture in HEIC", "save it as JPEG or PNG")
    assert name_bytes(b"<svg xmlns=", 11) == ("an SVG drawing", "save it as PNG")
    assert name_bytes("größe".encode(), 7) == ("a text", "")
    assert name_bytes(b"gr\xf6\xdfe", 5) is None
    assert name_bytes(bytes([128, 2, 99]), 3) is None
