"""Reads the weights of mmdet's GFL, ATSS, FCOS, RetinaNet and Faster R-CNN (versions 2.x and 3.x) on plain ResNets.

What they are is seen in the names and shapes of the weights. What no weight shows, anchors and thresholds above all, is
taken to be as in mmdet's own configs, which kdcli's recipes follow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kdcli.detectors.base import Detector, FcosVariant, ModelSpec
from kdcli.detectors.build import build_detector, recipe_of
from kdcli.detectors.convert.mmdet_file import MmdetFile, read_mmdet
from kdcli.detectors.convert.mmdet_style import find_style
from kdcli.detectors.convert.recipes import MM_FASTER_RCNN
from kdcli.detectors.two_stage.recipes import ROI_WIDTH
from kdcli.errors import OptionError

SHOWN = 5  # names in an error

_ROI = "roi_head.bbox_head"
# our detector -> prefix of mmdet's class and box convs; the first whose class conv is there
_HEADS = {"gfl": "gfl_", "atss": "atss_", "retinanet": "retina_", "fcos": "conv_"}
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

# mmdet's names -> ours, the first pattern that fits the whole name; \g<last> is weight, bias or a statistic
_LAST = r"(?P<last>\w+)"
_DENSE_NAMES = (
    (r"backbone\.(?P<path>.+)", r"backbone.\g<path>"),
    (rf"neck\.lateral_convs\.([012])\.conv\.{_LAST}", r"neck.lateral.\1.\g<last>"),
    (rf"neck\.fpn_convs\.([012])\.conv\.{_LAST}", r"neck.output.\1.\g<last>"),
    (rf"neck\.fpn_convs\.3\.conv\.{_LAST}", r"neck.p6.\g<last>"),
    (rf"neck\.fpn_convs\.4\.conv\.{_LAST}", r"neck.p7.\g<last>"),
    (rf"bbox_head\.(?:gfl|atss|retina|conv|fcos)_cls\.{_LAST}", r"head.cls.\g<last>"),
    (rf"bbox_head\.(?:gfl|atss|retina|conv|fcos)_reg\.{_LAST}", r"head.box.\g<last>"),
    (rf"bbox_head\.(?:atss|conv|fcos)_centerness\.{_LAST}", r"head.centerness.\g<last>"),
)
_TWO_STAGE_NAMES = (
    (r"backbone\.(?P<path>.+)", r"backbone.\g<path>"),
    (rf"neck\.lateral_convs\.(\d)\.conv\.{_LAST}", r"neck.inner_blocks.\1.0.\g<last>"),
    (rf"neck\.fpn_convs\.(\d)\.conv\.{_LAST}", r"neck.layer_blocks.\1.0.\g<last>"),
    (rf"rpn_head\.rpn_conv\.{_LAST}", r"rpn.conv.0.0.\g<last>"),
    (rf"rpn_head\.rpn_cls\.{_LAST}", r"rpn.cls_logits.\g<last>"),
    (rf"rpn_head\.rpn_reg\.{_LAST}", r"rpn.bbox_pred.\g<last>"),
    (rf"roi_head\.bbox_head\.shared_fcs\.0\.{_LAST}", r"roi.body.fc6.\g<last>"),
    (rf"roi_head\.bbox_head\.shared_fcs\.1\.{_LAST}", r"roi.body.fc7.\g<last>"),
    (rf"roi_head\.bbox_head\.fc_cls\.{_LAST}", r"roi.cls.\g<last>"),
    (rf"roi_head\.bbox_head\.fc_reg\.{_LAST}", r"roi.box.\g<last>"),
)
_TOWER = re.compile(rf"bbox_head\.(cls|reg)_convs\.(\d+)\.(conv|gn)\.{_LAST}")
_SCALE = re.compile(r"bbox_head\.scales\.(\d+)\.scale")


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
    backbone = _backbone_of(weights)
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
    )
    with torch.random.fork_rng(devices=[]):
        detector = build_detector(spec)
    state = _renamed(weights, two_stage=two_stage)
    state["backbone.conv1.weight"] = look.first_conv(state["backbone.conv1.weight"])
    _fill(detector, state, unbiased=kind == "fcos" and variant == "normalised")
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
    for side in re.findall(r"\boctave_base_scale=\s*([\d.]+)", config):
        if float(side) != ours:
            raise OptionError(f"the config in the file has octave_base_scale={side}, kdcli's {kind} {ours:g}")


def _backbone_of(weights: Mapping[str, Tensor]) -> str:
    blocks = [0, 0, 0, 0]
    for key in weights:
        if match := re.fullmatch(r"backbone\.layer([1-4])\.(\d+)\.conv1\.weight", key):
            blocks[int(match[1]) - 1] = max(blocks[int(match[1]) - 1], int(match[2]) + 1)
    first = weights.get("backbone.layer1.0.conv2.weight")
    groups = 1 if first is None else first.shape[0] // first.shape[1]
    found = ("backbone.layer1.0.conv3.weight" in weights, groups, tuple(blocks))
    if found not in _BACKBONES:
        raise OptionError(
            f"the backbone has {'-'.join(str(n) for n in blocks)} blocks of {groups} group(s), not those of "
            f"{', '.join(_BACKBONES.values())}"
        )
    return _BACKBONES[found]


def _size(weights: Mapping[str, Tensor], key: str) -> int:
    if key not in weights:
        raise OptionError(f"no '{key}' among the weights: not a plain model of mmdet's configs")
    return len(weights[key])


def _dense_spec(weights: Mapping[str, Tensor], kind: str, backbone: str) -> ModelSpec:
    old = "fcos_" if "bbox_head.fcos_cls.weight" in weights else _HEADS[kind]
    anchors = recipe_of(ModelSpec(kind, "resnet18", 1)).grid.num_anchors
    outputs, edges = (_size(weights, f"bbox_head.{old}{part}.weight") for part in ("cls", "reg"))
    if outputs % anchors or edges % (4 * anchors) or (kind != "gfl" and edges != 4 * anchors):
        raise OptionError(
            f"the head has {outputs} class and {edges} box outputs a cell, mmdet's {kind} {anchors} x classes and "
            f"{4 * anchors}{' x bins' if kind == 'gfl' else ''}: other anchors or another box branch"
        )
    channels = _size(weights, "neck.lateral_convs.0.conv.weight")
    convs = sum(bool(re.fullmatch(r"bbox_head\.cls_convs\.\d+\.conv\.weight", key)) for key in weights)
    width = _size(weights, "bbox_head.cls_convs.0.conv.weight") if convs else channels
    spec = ModelSpec(kind, backbone, outputs // anchors, channels, convs, None if width == channels else width)
    return replace(spec, reg_max=edges // 4 - 1) if kind == "gfl" else spec


def _two_stage_spec(weights: Mapping[str, Tensor], backbone: str) -> ModelSpec:
    width = _size(weights, f"{_ROI}.shared_fcs.0.weight")
    return ModelSpec(
        MM_FASTER_RCNN.name,
        backbone,
        num_classes=_size(weights, f"{_ROI}.fc_cls.weight") - 1,
        fpn_channels=_size(weights, "neck.lateral_convs.0.conv.weight"),
        head_channels=None if width == ROI_WIDTH else width,
    )


def _renamed(weights: Mapping[str, Tensor], *, two_stage: bool) -> dict[str, Tensor]:
    """``weights`` under our names. Raises OptionError that lists the names that mmdet's plain models do not have."""
    normed = any(_TOWER.fullmatch(key) and ".gn." in key for key in weights)
    state, unknown, scales = {}, [], {}
    for key, value in weights.items():
        tower, scale = _TOWER.fullmatch(key), _SCALE.fullmatch(key)
        if scale and not two_stage:
            scales[int(scale[1])] = value.reshape(())
        elif tower and not two_stage:
            place = int(tower[2]) * (3 if normed else 2) + (tower[3] == "gn")  # conv, norm if any, relu
            state[f"head.{'box' if tower[1] == 'reg' else 'cls'}_tower.{place}.{tower['last']}"] = value
        elif (ours := _rename(key, _TWO_STAGE_NAMES if two_stage else _DENSE_NAMES)) is not None:
            state[ours] = value
        else:
            unknown.append(key)
    if unknown:
        raise OptionError(f"weights that kdcli has no place for: {_some(unknown)}; only plain models can be converted")
    if scales:
        state["head.scales"] = torch.stack([scales[k] for k in sorted(scales)])
    return state


def _rename(key: str, names: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, replacement in names:
        if match := re.fullmatch(pattern, key):
            return match.expand(replacement)
    return None


def _fill(detector: Detector, state: dict[str, Tensor], *, unbiased: bool) -> None:
    """Load ``state``; with ``unbiased`` the convs of the towers may lack a bias, which then is 0.

    Raises OptionError listing what is missing, too much or of another shape, under our names.
    """
    towers = {f"{name}.bias" for name, m in detector.named_modules() if "_tower." in name and isinstance(m, nn.Conv2d)}
    own = detector.state_dict()
    for key in own.keys() - state.keys():
        # batch norms of before PyTorch 0.4.1, and of stripped files, do not count their batches
        if key.endswith("num_batches_tracked") or (unbiased and key in towers):
            state[key] = torch.zeros_like(own[key])
    problems = {
        "missing": own.keys() - state.keys(),
        "too many": state.keys() - own.keys(),
        "of another shape": {k for k in own.keys() & state.keys() if own[k].shape != state[k].shape},
    }
    said = [f"{kind}: {_some(sorted(keys))}" for kind, keys in problems.items() if keys]
    if said:
        raise OptionError(f"weights of {detector.spec.name} do not fit: {'; '.join(said)}")
    detector.load_state_dict(state, strict=True)


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"
