"""Reads backbone and FPN of any detector of mmdet (versions 2.x and 3.x) and leaves its head out: `--features-only`.

Cascade, Mask, Grid and Dynamic R-CNN, RepPoints, GFLv2 and others have the same FPN as the detectors that are read whole;
for methods that read feature maps it is all of a teacher.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from kdcli.detectors.base import MM_FEATURES, Detector, FeatureNeck, ModelSpec
from kdcli.detectors.build import build_to_fill
from kdcli.detectors.convert.classes import WHERE
from kdcli.detectors.convert.mmdet_backbone import backbone_of, deformable_of, foreign_part, size_of
from kdcli.detectors.convert.mmdet_file import read_mmdet
from kdcli.detectors.convert.mmdet_names import fill, renamed
from kdcli.detectors.convert.mmdet_style import find_style
from kdcli.errors import OptionError

FILE = "the config in the file"
_LEVELS = 5  # that kdcli has: a neck's num_outs


@dataclass(frozen=True)
class ConvertedFeatures:
    """names, style, style_source: as of ``Converted``. neck: what makes the levels above C5's, and where it was found.
    left_out: the first names of the weights that are not read, such as ``roi_head.``.
    """

    detector: Detector
    names: list[str] | None
    style: str
    style_source: str
    neck: str
    left_out: tuple[str, ...]


def convert_mmdet_features(
    content: object, *, classes: int | None, prefix: str | None = None, style: str | None = None,
    neck: FeatureNeck | None = None,
) -> ConvertedFeatures:  # fmt: skip
    """Backbone and neck of ``content``, a file of mmdet as ``files.load_torch`` reads it, in eval mode.

    classes: how many the user named, for a file that names none. prefix, style: see ``convert_mmdet``. neck: None: as the
    config in the file says, or else as the shapes of the weights do. Raises OptionError on a backbone or a neck that kdcli
    has not, by name.
    """
    file = read_mmdet(content, prefix=prefix)
    if part := foreign_part(file.weights):
        raise OptionError(f"the weights are those of {part}; kdcli takes plain ResNets and ResNeXts with a plain FPN")
    count = classes if file.names is None else len(file.names)
    if count is None:
        raise OptionError(f"the file does not name its classes; give them with {WHERE}")
    weights = {k: v for k, v in file.weights.items() if k.startswith(("backbone.", "neck."))}
    head = {f"{k.partition('.')[0]}." for k in file.weights.keys() - weights.keys()}
    name, look, source = find_style(style, file.config, weights, plain_fcos=False)
    kind, said = find_neck(neck, file.config, weights)
    spec = ModelSpec(
        MM_FEATURES,
        backbone_of(weights),
        count,
        fpn_channels=size_of(weights, "neck.lateral_convs.0.conv.weight"),
        bn="frozen",
        image_mean=look.image_mean,
        stride_in_1x1=look.stride_in_1x1 and "backbone.layer1.0.conv3.weight" in weights,
        dcn=deformable_of(weights),
        neck=kind,
    )
    detector = build_to_fill(spec, weights)
    state = renamed(weights, two_stage=kind == "pool")
    state["backbone.conv1.weight"] = look.first_conv(state["backbone.conv1.weight"])
    fill(detector, state, unbiased=False)
    left_out = tuple(sorted({*file.left_out, *head}))
    return ConvertedFeatures(detector.eval(), file.names, name, source, said, left_out)


def find_neck(given: FeatureNeck | None, config: str, weights: Mapping[str, Tensor]) -> tuple[FeatureNeck, str]:
    """(neck, a line with where it was found) for ModelSpec.neck.

    Four lateral convolutions have a pooled P6; three have two convolutions more, and the first one's input channels say
    what it reads where the ``config`` text does not (mmdet's ``add_extra_convs``; True and 2.x's ``extra_convs_on_inputs``
    included). No weight shows a relu between the two: without a config there is none. Raises OptionError for another neck,
    and where two sources disagree.
    """
    laterals, outputs = (
        sum(bool(re.fullmatch(rf"neck\.{part}\.\d+\.conv\.weight", key)) for key in weights)
        for part in ("lateral_convs", "fpn_convs")
    )
    if (laterals, outputs) not in ((4, 4), (3, _LEVELS)):
        raise OptionError(
            f"the neck has {laterals} lateral and {outputs} output convs; kdcli takes an FPN with 4 and 4 (P6 is pooled) "
            "or 3 and 5 (P6 and P7 are convs)"
        )
    levels = set(re.findall(r"\bnum_outs['\"]?\s*[=:]\s*(\d+)", config))
    if levels - {str(_LEVELS)}:
        raise OptionError(f"{FILE} has num_outs={', '.join(sorted(levels))}; kdcli's necks have {_LEVELS} levels")
    if laterals == 4:
        if given not in (None, "pool"):
            raise OptionError(f"model.neck = '{given}': the neck has 4 lateral convs and a pooled P6; leave it out")
        return "pool", f"strides 4 to 64, P6 pooled ({FILE if levels else 'assumed, from 4 lateral convs'})"
    found, source = _extra_convs(config)
    relu, relu_source = _flag(config, "relu_before_extra_convs"), FILE
    if given is not None:
        if given == "pool":
            raise OptionError("model.neck = 'pool': the neck has convs for P6 and P7; leave it out")
        found, source = given.removesuffix("_relu"), "--set model.neck"
        relu, relu_source = given.endswith("_relu"), source
    elif relu is None:
        relu, relu_source = False, FILE if found else "assumed"
    shaped = _by_shape(weights)
    if found is None:
        if shaped is None:
            raise OptionError(
                "P6 may read C5 or P5, which have as many channels; say which with --set model.neck=on_input or on_output"
            )
        found, source = shaped, "assumed, from the channels of fpn_convs.3"
    if shaped not in (None, found):
        raise OptionError(f"{source} says {found}, the channels of fpn_convs.3 {shaped}; see --set model.neck")
    kind = f"{found}_relu" if relu else found
    line = f"strides 8 to 128, P6 of {'C5' if found == 'on_input' else 'P5'} ({source}), P7 of "
    return cast(FeatureNeck, kind), line + f"{'relu(P6)' if relu else 'P6'} ({relu_source})"


def _by_shape(weights: Mapping[str, Tensor]) -> str | None:
    """What the first extra conv reads, by its input channels; None where C5 and P5 have the same number."""
    keys = (f"neck.{part}.conv.weight" for part in ("fpn_convs.3", "lateral_convs.2", "fpn_convs.2"))
    channels, wide, narrow = (size_of(weights, key, inputs=True) for key in keys)
    if wide == narrow:
        return None
    return {wide: "on_input", narrow: "on_output"}.get(channels)


def _extra_convs(config: str) -> tuple[str | None, str]:
    """``on_input`` or ``on_output`` as ``config`` says, None where it does not."""
    values = set(re.findall(r"\badd_extra_convs['\"]?\s*[=:]\s*['\"]?(\w+)", config))
    if not values:
        return None, ""
    if len(values) > 1 or not values <= {"True", "on_input", "on_output"}:
        raise OptionError(
            f"{FILE} has add_extra_convs={', '.join(sorted(values))}; kdcli has on_input and on_output: name one with "
            "--set model.neck if it is the same"
        )
    value = values.pop()
    if value == "True":
        value = "on_output" if _flag(config, "extra_convs_on_inputs") is False else "on_input"
    return value, FILE


def _flag(config: str, name: str) -> bool | None:
    """What ``config`` says of a flag; None where it says nothing. Raises OptionError when it says both."""
    values = set(re.findall(rf"\b{name}['\"]?\s*[=:]\s*(True|False)", config))
    if len(values) > 1:
        raise OptionError(f"{FILE} has both values of {name}; say which with --set model.neck")
    return values == {"True"} if values else None
