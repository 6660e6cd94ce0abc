"""From a model's name and options to a detector: ``gfl_resnet18`` is detector ``gfl`` on backbone ``resnet18``."""

from __future__ import annotations

from dataclasses import replace

from kdcli.detectors.backbones import BACKBONES, load_backbone_weights
from kdcli.detectors.base import Detector, ModelSpec, count_parameters
from kdcli.detectors.dense.detector import DenseDetector
from kdcli.detectors.dense.recipes import GFL, RETINANET, Recipe
from kdcli.errors import OptionError, nearest

__all__ = [
    "BACKBONES",
    "DETECTORS",
    "ModelSpec",
    "build_detector",
    "count_parameters",
    "model_names",
    "parse_model_name",
]

DETECTORS: dict[str, Recipe] = {recipe.name: recipe for recipe in (GFL, RETINANET)}


def model_names() -> list[str]:
    """Every ``<detector>_<backbone>``."""
    return [f"{detector}_{backbone}" for detector in DETECTORS for backbone in BACKBONES]


def parse_model_name(name: str) -> tuple[str, str]:
    """Split ``gfl_resnet18`` into ``("gfl", "resnet18")``. Raises OptionError with the nearest name."""
    for detector in DETECTORS:
        backbone = name.removeprefix(f"{detector}_")
        if backbone != name and backbone in BACKBONES:
            return detector, backbone
    raise OptionError(f"model '{name}': unknown{nearest(name, model_names())}")


def build_detector(spec: ModelSpec, backbone_weights: str = "none") -> Detector:
    """The detector of ``spec`` in train mode, on the CPU, with random weights from torch's global generator.

    backbone_weights: ``none``, ``imagenet`` (downloaded by torchvision) or the path of a torchvision state dict.
    ``spec.bn`` of ``auto`` becomes ``train`` without and ``frozen`` with pretrained weights. Raises OptionError on
    unknown names and weights of another backbone, MissingPathError on weights that are not there.
    """
    if spec.detector not in DETECTORS:
        raise OptionError(f"detector '{spec.detector}': unknown{nearest(spec.detector, DETECTORS)}")
    if spec.bn == "auto":
        spec = replace(spec, bn="train" if backbone_weights == "none" else "frozen")
    detector = DenseDetector(spec, DETECTORS[spec.detector])
    if backbone_weights != "none":
        load_backbone_weights(detector.backbone, backbone_weights)
    return detector
