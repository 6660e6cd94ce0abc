"""Which ResNet the backbone of a file of mmdet is, by the names and shapes of its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from kdcli.detectors.base import Dcn
from kdcli.errors import OptionError

# (bottlenecks, groups) of the 3x3 convs, blocks of each stage -> our backbone
_BACKBONES = {
    (False, 1, (2, 2, 2, 2)): "resnet18",
    (False, 1, (3, 4, 6, 3)): "resnet34",
    (True, 1, (3, 4, 6, 3)): "resnet50",
    (True, 1, (3, 4, 23, 3)): "resnet101",
    (True, 1, (3, 8, 36, 3)): "resnet152",
    (True, 32, (3, 4, 23, 3)): "resnext101_32x4d",
    (True, 64, (3, 4, 23, 3)): "resnext101_64x4d",
}
# what kdcli has not -> a weight that only it has, anywhere in a file; the first that fits
_FOREIGN = (
    ("a Swin transformer", r"backbone\.patch_embed\."),
    ("a Res2Net", r"backbone\.layer\d\.\d+\.convs\."),
    ("a ResNet with a deep stem (ResNetV1d, ResNeSt)", r"backbone\.stem\."),
    ("an HRNet", r"backbone\.stage2\."),
    ("a PAFPN", r"neck\.(?:downsample_convs|pafpn_convs)\."),
    ("an FPN with norms", r"neck\.(?:lateral|fpn)_convs\.\d+\.(?:gn|bn|norm)\."),
)


def foreign_part(keys: Iterable[str]) -> str | None:
    """What the weights ``keys`` have that kdcli has not, by name: a Swin transformer, a PAFPN, ...; None: nothing known."""
    names = "\n".join(keys)
    return next((part for part, pattern in _FOREIGN if re.search(rf"(?:^|\.){pattern}", names, re.MULTILINE)), None)


def backbone_of(weights: Mapping[str, Tensor]) -> str:
    """The name of the backbone. Raises OptionError on none of ours."""
    blocks = [0, 0, 0, 0]
    for key in weights:
        if match := re.fullmatch(r"backbone\.layer([1-4])\.(\d+)\.conv1\.weight", key):
            blocks[int(match[1]) - 1] = max(blocks[int(match[1]) - 1], int(match[2]) + 1)
    first = weights.get("backbone.layer1.0.conv2.weight")
    groups = 1 if first is None or first.ndim != 4 else first.shape[0] // max(first.shape[1], 1)
    found = ("backbone.layer1.0.conv3.weight" in weights, groups, tuple(blocks))
    if found not in _BACKBONES:
        raise OptionError(
            f"the backbone has {'-'.join(str(n) for n in blocks)} blocks of {groups} group(s), not those of "
            f"{', '.join(_BACKBONES.values())}"
        )
    return _BACKBONES[found]


def deformable_of(weights: Mapping[str, Tensor]) -> Dcn:
    """Whether there are deformable convolutions, and which: conv_offset gives 2 numbers for each of 9 points, or 3 with a
    mask. Raises OptionError on another number: several deform_groups."""
    outputs = {v.numel() for k, v in weights.items() if re.fullmatch(r"backbone\..+\.conv2(?:\.conv)?_offset\.bias", k)}
    if not outputs:
        return "none"
    versions: dict[int, Dcn] = {18: "v1", 27: "v2"}
    if len(outputs) > 1 or not outputs <= versions.keys():
        raise OptionError(
            f"the deformable convolutions of the backbone have {', '.join(str(n) for n in sorted(outputs))} offsets a cell, "
            "not 18 (DCN) or 27 (DCNv2) with one deform group"
        )
    return versions[outputs.pop()]


def size_of(weights: Mapping[str, Tensor], key: str, *, inputs: bool = False) -> int:
    """Outputs (``inputs``: what it reads) of the layer whose weight is ``key``. Raises OptionError where there is none."""
    if key not in weights:
        raise OptionError(f"no '{key}' among the weights: not a plain model of mmdet's configs")
    if weights[key].ndim not in (2, 4) or not weights[key].numel():  # linear, conv
        raise OptionError(f"'{key}' has the shape {tuple(weights[key].shape)}: not a plain model of mmdet's configs")
    return weights[key].shape[1 if inputs else 0]
