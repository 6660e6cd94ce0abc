"""Reads the weights of mmdet's GFL, ATSS, FCOS, RetinaNet and Faster R-CNN (versions 2.x and 3.x) on plain ResNets.

What they are is seen in the names and shapes of the weights. What no weight shows, anchors and thresholds above all, is
taken to be as in mmdet's own configs, which kdcli's recipes follow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from kdcli.detectors.base import Detector, FcosVariant, ModelSpec
from kdcli.detectors.build import build_to_fill, recipe_of
from kdcli.detectors.convert.mmdet_backbone import backbone_of, deformable_of, size_of
from kdcli.detectors.convert.mmdet_file import MmdetFile, read_mmdet
from kdcli.detectors.convert.mmdet_names import SHOWN, fill, renamed
from kdcli.detectors.convert.mmdet_style import find_style
from kdcli.detectors.convert.recipes import MM_FASTER_RCNN
from kdcli.detectors.two_stage.recipes import ROI_WIDTH
from kdcli.errors import OptionError

_ROI = "roi_head.bbox_head"
# our detector -> prefix of mmdet's class and box convs; the first whose class conv is there
_HEADS = {"gfl": "gfl_", "atss": "atss_", "retinanet": "retina_", "fcos": "conv_"}


@dataclass(frozen=True)
class Converted:
    """names: of the classes, None if the file does not say. style, style_source: a name of STYLES (``own``: the config
    has other numbers) and where it was found. left_out: prefixes of other weights in the file.
    """

    detector: Detector
    names: list[str] | None
    style: str
    style_source: str
    left_out: tuple[str, ...]


def convert_mmdet(
    content: object, *, prefix: str | None = None, style: str | None = None, fcos: FcosVariant | None = None
) -> Converted:
    """The detector of ``content``, a file of mmdet as ``files.load_torch`` reads it, in eval mode.

    prefix: see ``read_mmdet``. style: a name of STYLES; None: see ``find_style``. fcos: None: as the config in the file
    says, or else normalised if the convs of the head have a bias, as in mmdet's configs. Raises OptionError on the
    weights of another model; nothing in the file is dropped silently but GFL's constant ``integral.project``.
    """
    file = read_mmdet(content, prefix=prefix)
    weights = file.weights
    kind = _detector_of(weights)
    if fcos is not None and kind != "fcos":
        raise OptionError(f"model.fcos = '{fcos}': the file holds a {kind}; leave it out")
    variant = fcos or (_fcos_variant(file) if kind == "fcos" else "normalised")
    name, look, source = find_style(style, file.config, weights, plain_fcos=kind == "fcos" and variant == "plain")
    backbone = backbone_of(weights)
    bottlenecks = "backbone.layer1.0.conv3.weight" in weights
    two_stage = kind == MM_FASTER_RCNN.name
    if not two_stage:
        _require_anchors(kind, file.config)
    spec = replace(
        _two_stage_spec(weights, backbone) if two_stage else _dense_spec(weights, kind, backbone),
        bn="frozen",
        fcos=variant,
        image_mean=look.image_mean,
        stride_in_1x1=look.stride_in_1x1 and bottlenecks,
        dcn=deformable_of(weights),
    )
    detector = build_to_fill(spec, weights)
    state = renamed(weights, two_stage=two_stage)
    state["backbone.conv1.weight"] = look.first_conv(state["backbone.conv1.weight"])
    fill(detector, state, unbiased=kind == "fcos" and variant == "normalised")
    return Converted(detector.eval(), file.names, name, source, file.left_out)


def _detector_of(weights: Mapping[str, Tensor]) -> str:
    if "rpn_head.rpn_cls.weight" in weights and f"{_ROI}.fc_cls.weight" in weights:
        return MM_FASTER_RCNN.name
    if "bbox_head.fcos_cls.weight" in weights:  # early 2.x
        return "fcos"
    for name, head in _HEADS.items():
        if f"bbox_head.{head}cls.weight" in weights and (
            name != "fcos" or "bbox_head.conv_centerness.weight" in weights
        ):
            return name
    heads = sorted({".".join(k.split(".")[:2]) for k in weights if not k.startswith(("backbone.", "neck."))})
    raise OptionError(
        f"not a GFL, ATSS, FCOS, RetinaNet or Faster R-CNN of mmdet: its head has {', '.join(heads[:SHOWN]) or 'nothing'}"
    )


def _fcos_variant(file: MmdetFile) -> FcosVariant:
    normed, on_box = (f"{name}=True" in file.config for name in ("norm_on_bbox", "centerness_on_reg"))
    if file.config and normed != on_box:
        raise OptionError(
            "the config in the file has one of norm_on_bbox and centerness_on_reg, kdcli's FCOS both or neither"
        )
    biased = "bbox_head.cls_convs.0.conv.bias" in file.weights
    return "normalised" if (normed if file.config else biased) else "plain"


def _require_anchors(kind: str, config: str) -> None:
    """Raises OptionError when the config has other anchors than ours; of one size, no weight shows them."""
    ours = recipe_of(ModelSpec(kind, "resnet18", 1)).grid.base_scale
    for side in re.findall(r"\boctave_base_scale=\s*(\d{1,9}(?:\.\d{1,9})?)\b", config):
        if float(side) != ours:
            raise OptionError(f"the config in the file has octave_base_scale={side}, kdcli's {kind} {ours:g}")


def _dense_spec(weights: Mapping[str, Tensor], kind: str, backbone: str) -> ModelSpec:
    old = "fcos_" if "bbox_head.fcos_cls.weight" in weights else _HEADS[kind]
    anchors = recipe_of(ModelSpec(kind, "resnet18", 1)).grid.num_anchors
    outputs, edges = (size_of(weights, f"bbox_head.{old}{part}.weight") for part in ("cls", "reg"))
    if outputs % anchors or edges % (4 * anchors) or (kind != "gfl" and edges != 4 * anchors):
        raise OptionError(
            f"the head has {outputs} class and {edges} box outputs a cell, mmdet's {kind} {anchors} x classes and "
            f"{4 * anchors}{' x bins' if kind == 'gfl' else ''}: other anchors or another box branch"
        )
    channels = size_of(weights, "neck.lateral_convs.0.conv.weight")
    convs = sum(bool(re.fullmatch(r"bbox_head\.cls_convs\.\d+\.conv\.weight", key)) for key in weights)
    width = size_of(weights, "bbox_head.cls_convs.0.conv.weight") if convs else channels
    spec = ModelSpec(kind, backbone, outputs // anchors, channels, convs, None if width == channels else width)
    return replace(spec, reg_max=edges // 4 - 1) if kind == "gfl" else spec


def _two_stage_spec(weights: Mapping[str, Tensor], backbone: str) -> ModelSpec:
    width = size_of(weights, f"{_ROI}.shared_fcs.0.weight")
    return ModelSpec(
        MM_FASTER_RCNN.name,
        backbone,
        num_classes=size_of(weights, f"{_ROI}.fc_cls.weight") - 1,
        fpn_channels=size_of(weights, "neck.lateral_convs.0.conv.weight"),
        head_channels=None if width == ROI_WIDTH else width,
    )
