"""Reads the weights of torchvision's detectors: RetinaNet v1 and v2, FCOS, Faster R-CNN v1 and v2 on ResNet-50.

torchvision itself reads the file, into its own model, since it renames the keys of old files (every v1 file is one).
The mobile Faster R-CNNs are not read: their finest map has stride 32, which no kdcli backbone gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from kdcli.detectors.base import Detector, ModelSpec
from kdcli.detectors.convert.coco import COCO_IDS, COCO_OUTPUTS
from kdcli.detectors.convert.recipes import TORCHVISION, build_torchvision
from kdcli.errors import OptionError, did_you_mean

BACKBONE = "resnet50"
BN_EPS = 1e-5  # of PyTorch's batch norm

_DENSE_CLASSES = "head.classification_head.cls_logits"
_ROI_CLASSES = "roi_heads.box_predictor.cls_score"
_ROI_BOXES = "roi_heads.box_predictor.bbox_pred"

# torchvision's names -> ours, the first pattern that fits
_DENSE_NAMES = (
    (r"backbone\.body\.", "backbone."),
    (r"backbone\.fpn\.inner_blocks\.(\d+)\.0\.", r"neck.lateral.\1."),
    (r"backbone\.fpn\.layer_blocks\.(\d+)\.0\.", r"neck.output.\1."),
    (r"backbone\.fpn\.extra_blocks\.", "neck."),
    (r"head\.classification_head\.cls_logits\.", "head.cls."),
    (r"head\.regression_head\.bbox_reg\.", "head.box."),
    (r"head\.regression_head\.bbox_ctrness\.", "head.centerness."),
    (r"head\.classification_head\.conv\.", "head.cls_tower."),
    (r"head\.regression_head\.conv\.", "head.box_tower."),
)
_TWO_STAGE_NAMES = (
    (r"backbone\.body\.", "backbone."),
    (r"backbone\.fpn\.", "neck."),
    (r"rpn\.head\.", "rpn."),
    (r"roi_heads\.box_head\.", "roi.body."),
    (r"roi_heads\.box_predictor\.cls_score\.", "roi.cls."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "roi.box."),
)


@dataclass(frozen=True)
class Source:
    """A torchvision model: its recipe here, and the eps of the frozen batch norm that its published weights run with.

    Frozen batch norms once had no eps; torchvision still sets 0 for the two models trained then (pytorch/vision 2933).
    """

    recipe: str
    frozen_eps: float = BN_EPS


SOURCES: dict[str, Source] = {
    "retinanet_resnet50_fpn": Source("tv_retinanet", frozen_eps=0.0),
    "retinanet_resnet50_fpn_v2": Source("tv_retinanet_v2"),
    "fcos_resnet50_fpn": Source("tv_fcos"),
    "fasterrcnn_resnet50_fpn": Source("tv_faster_rcnn", frozen_eps=0.0),
    "fasterrcnn_resnet50_fpn_v2": Source("tv_faster_rcnn_v2"),
}


def convert_torchvision(state: Mapping[str, Tensor], name: str, *, bn_eps: float | None = None) -> Detector:
    """The detector of ``state``, the state dict of torchvision's model ``name`` (a key of SOURCES), in eval mode.

    Of 91 outputs the 80 that COCO uses are kept, in the order of ``COCO_CLASSES``; of another number all but the
    first, which is torchvision's background. bn_eps: of the backbone's batch norms where the weights were trained. None:
    1e-5 if they were trained batch norms (which count their batches) or the outputs are not COCO's 91, so that they are
    a user's own; else that of the published weights, whose frozen ones torchvision runs with 0.

    Raises OptionError when ``name`` is unknown or the weights are those of another model.
    """
    outputs = class_outputs(state, name)
    source = SOURCES[name]
    grid = TORCHVISION[source.recipe].grid
    two_stage = name.startswith("fasterrcnn")
    kept = COCO_IDS if outputs == COCO_OUTPUTS else tuple(range(1, outputs))
    if not kept:
        raise OptionError(f"weights of torchvision's {name}: {outputs} outputs are a background and no class")
    spec = ModelSpec(source.recipe, BACKBONE, num_classes=len(kept), bn="frozen")
    with torch.random.fork_rng(devices=[]):
        detector = build_torchvision(spec)
    weights = _current_names(state, name, outputs)
    if two_stage:
        weights = _two_stage_weights(weights, kept, outputs)
    else:
        weights = _dense_weights(weights, kept, grid.num_anchors)
    if bn_eps is None:
        counted = any(key.startswith("backbone.body.") and key.endswith("num_batches_tracked") for key in state)
        bn_eps = BN_EPS if counted or outputs != COCO_OUTPUTS else source.frozen_eps
    _fold_eps(weights, detector, bn_eps, name)
    detector.load_state_dict(weights, strict=True)
    return detector.eval()


def class_outputs(state: Mapping[str, Tensor], name: str) -> int:
    """The number of classes that torchvision's model ``name`` predicts with the weights ``state``, background and holes
    included. Raises OptionError as ``convert_torchvision``."""
    if name not in SOURCES:
        raise OptionError(f"torchvision model '{name}': unknown{did_you_mean(name, SOURCES)}")
    two_stage = name.startswith("fasterrcnn")
    last = f"{_ROI_CLASSES if two_stage else _DENSE_CLASSES}.bias"
    if last not in state:
        raise OptionError(f"weights of torchvision's {name}: no '{last}'; take the state dict of a whole detector")
    return len(state[last]) // (1 if two_stage else TORCHVISION[SOURCES[name].recipe].grid.num_anchors)


def _current_names(state: Mapping[str, Tensor], name: str, outputs: int) -> dict[str, Tensor]:
    """``state`` under the names of today's torchvision."""
    with torch.device("meta"):  # no memory and no random numbers for what the weights replace
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=outputs)
    try:
        model.load_state_dict(dict(state), strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise OptionError(f"weights of torchvision's {name}: {reason}") from error
    weights: dict[str, Tensor] = model.state_dict()
    return weights


def _renamed(key: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in names:
        if re.match(pattern, key):
            return re.sub(pattern, replacement, key, count=1)
    raise AssertionError(f"a torchvision weight that no rule names: {key}")


def _dense_weights(weights: Mapping[str, Tensor], kept: tuple[int, ...], anchors: int) -> dict[str, Tensor]:
    """A dense detector's weights under our names, with the class outputs ``kept`` of each of the anchors."""
    normed = any(re.search(r"_head\.conv\.0\.1\.", key) for key in weights)  # RetinaNet v2: conv, norm in one block
    result = {}
    for key, value in weights.items():
        if key.startswith(f"{_DENSE_CLASSES}."):
            value = value.unflatten(0, (anchors, -1))[:, list(kept)].flatten(0, 1)
        block = re.search(r"_head\.conv\.(\d+)\.(\d)\.", key)
        if block:  # RetinaNet: block k of conv, norm if any, relu; our tower is a flat sequence
            place = int(block[1]) * (3 if normed else 2) + int(block[2])
            key = key[: block.start()] + f"_head.conv.{place}." + key[block.end() :]
        result[_renamed(key, _DENSE_NAMES)] = value
    return result


def _two_stage_weights(weights: Mapping[str, Tensor], kept: tuple[int, ...], outputs: int) -> dict[str, Tensor]:
    """A Faster R-CNN's weights under our names; its background moves from the first output to the last."""
    result = {}
    for key, value in weights.items():
        if key.startswith(f"{_ROI_CLASSES}."):
            value = value[[*kept, 0]]
        elif key.startswith(f"{_ROI_BOXES}."):
            value = value.reshape(outputs, 4, *value.shape[1:])[list(kept)].flatten(0, 1)
        result[_renamed(key, _TWO_STAGE_NAMES)] = value
    return result


def _fold_eps(weights: dict[str, Tensor], detector: Detector, eps: float, name: str) -> None:
    """Scale the backbone's batch norm weights so that our eps gives what ``eps`` gave: w / sqrt(var + eps)."""
    for path, module in detector.named_modules():
        if not path.startswith("backbone.") or not isinstance(module, nn.BatchNorm2d) or module.eps == eps:
            continue
        variance = weights[f"{path}.running_var"].double()
        weight = weights[f"{path}.weight"].double() * ((variance + module.eps) / (variance + eps)).sqrt()
        if not torch.isfinite(weight).all():
            raise OptionError(f"weights of torchvision's {name}: {path} has a variance of 0 and an eps of {eps}")
        weights[f"{path}.weight"] = weight.float()
