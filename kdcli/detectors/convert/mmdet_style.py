"""How an mmdet model wants its images, and where its bottlenecks have their stride: what no weight shows.

mmdet's models start either from torchvision's backbones or from Caffe's, which read BGR in 0..255 without a division and
have the stride of a bottleneck in its first conv. ``first_conv`` puts order and division into the weights, exactly; the
mean cannot go there, since the conv's zero padding stands for the mean colour, so that it is a field of the ModelSpec.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcli.detectors.base import IMAGE_STD
from kdcli.errors import OptionError, did_you_mean

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Style:
    """mean, std: red, green, blue, in 0..255. bgr: the order in which the first conv reads them. stride_in_1x1: see
    ModelSpec."""

    mean: Colour
    std: Colour
    bgr: bool
    stride_in_1x1: bool

    @property
    def image_mean(self) -> Colour:
        """The mean in 0..1, as ModelSpec has it."""
        red, green, blue = (round(v / 255, 9) for v in self.mean)  # 123.675 / 255 is to be 0.485
        return red, green, blue

    def first_conv(self, weight: Tensor) -> Tensor:
        """The first conv's ``weight`` [C, 3, h, w] for RGB images that were divided by our standard deviation.

        Raises OptionError for a weight of another shape.
        """
        if weight.ndim != 4 or weight.shape[1] != 3:
            raise OptionError(f"'backbone.conv1.weight' has the shape {tuple(weight.shape)}: it reads no colour images")
        ordered = weight.flip(1) if self.bgr else weight
        factor = [round(255 * ours / theirs, 9) for ours, theirs in zip(IMAGE_STD, self.std, strict=True)]
        scaled = ordered.double() * torch.tensor(factor, dtype=torch.float64).reshape(1, 3, 1, 1)
        return scaled.to(weight.dtype)


STYLES: dict[str, Style] = {
    "pytorch": Style((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), bgr=False, stride_in_1x1=False),
    "caffe": Style((123.675, 116.28, 103.53), (1.0, 1.0, 1.0), bgr=True, stride_in_1x1=True),  # detectron2's ResNets
    "detectron": Style((122.7717, 115.9465, 102.9801), (1.0, 1.0, 1.0), bgr=True, stride_in_1x1=True),  # its first ones
}

_NUMBERS = r"(?<![\w]){}=\s*[\[(]([\d.,\s]+)[\])]"
_FLAG = r"\b(?:bgr_)?to_rgb=\s*(True|False)"
_STRIDE = r"""\bstyle=\s*['"](\w+)['"]"""


def find_style(
    given: str | None, config: str, weights: Mapping[str, Tensor], *, plain_fcos: bool
) -> tuple[str, Style, str]:
    """(name, style, where it was found) of the style ``given`` by name, or of the ``config`` text, or as the ``weights``
    (mmdet's names) suggest.

    Caffe's batch norms were merged into a scale and a shift before mmdet took them over and stay so, since its configs
    freeze them: running means that are all 0 say Caffe. Which mean then follows mmdet's configs: Detectron's for the
    FCOS of the paper, detectron2's for all others. Raises OptionError on an unknown name or a config that says two
    things.
    """
    if given is not None:
        if given not in STYLES:
            raise OptionError(f"--style '{given}': unknown{did_you_mean(given, STYLES)}")
        return given, STYLES[given], "--style"
    said = _read_config(config)
    if said is not None:
        return next((n for n, s in STYLES.items() if s == said), "own"), said, "the config in the file"
    means = [v for k, v in weights.items() if k.startswith("backbone.") and k.endswith(".running_mean")]
    if means and not any(bool(v.any()) for v in means):
        name = "detectron" if plain_fcos else "caffe"
        return name, STYLES[name], "batch norms without statistics"
    return "pytorch", STYLES["pytorch"], "batch norms with statistics"


def _read_config(config: str) -> Style | None:
    """The style that ``config`` states, None where it says nothing of the normalisation."""
    means, stds = (set(re.findall(_NUMBERS.format(name), config)) for name in ("mean", "std"))
    orders, strides = (set(re.findall(pattern, config)) for pattern in (_FLAG, _STRIDE))
    means, stds = {_colour(v) for v in means}, {_colour(v) for v in stds}
    if not (means or stds):
        return None
    if len(means) != 1 or len(stds) != 1 or len(orders) != 1 or len(strides) > 1:
        raise OptionError(
            f"the config in the file has {len(means)} means, {len(stds)} stds, {len(orders)} values of to_rgb, "
            f"{len(strides)} of style; say which with --style {'|'.join(STYLES)}"
        )
    mean, std, bgr = means.pop(), stds.pop(), orders == {"False"}
    if 0 in std:
        raise OptionError(
            f"the config in the file divides by a deviation of 0; say which with --style {'|'.join(STYLES)}"
        )
    if bgr:  # the config has them in the order that the conv reads
        mean, std = mean[::-1], std[::-1]
    return Style(mean, std, bgr, strides == {"caffe"})


def _colour(text: str) -> Colour:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    numbers = [float(part) for part in parts if re.fullmatch(r"\d+\.?\d*|\.\d+", part)]
    if len(parts) != 3 or len(numbers) != 3:
        raise OptionError(
            f"the config in the file normalises with '{' '.join(text.split())}', not with three numbers"[:300]
        )
    return numbers[0], numbers[1], numbers[2]
