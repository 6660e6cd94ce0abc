"""From a model's name and options to a detector: ``gfl_resnet18`` is detector ``gfl`` on backbone ``resnet18``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kdcli.detectors.backbones import BACKBONES, Backbone, load_backbone_weights
from kdcli.detectors.base import MM_FEATURES, Detector, ModelSpec, count_parameters
from kdcli.detectors.convert.recipes import MM_FASTER_RCNN, TORCHVISION, build_torchvision
from kdcli.detectors.dense.detector import DenseDetector
from kdcli.detectors.dense.recipes import ATSS, FCOS, FCOS_PLAIN, GFL, RETINANET, Recipe, with_options
from kdcli.detectors.features import FeaturesDetector, without_head
from kdcli.detectors.soundness import count_elements
from kdcli.detectors.two_stage.detector import TwoStageDetector
from kdcli.detectors.two_stage.recipes import FASTER_RCNN, TwoStageRecipe
from kdcli.errors import OptionError, did_you_mean

__all__ = [
    "BACKBONES",
    "DETECTORS",
    "ModelSpec",
    "build_detector",
    "build_to_fill",
    "count_parameters",
    "default_keys",
    "default_lr",
    "detector_names",
    "family_of",
    "model_names",
    "parse_model_name",
    "recipe_of",
]

DETECTORS: dict[str, Recipe | TwoStageRecipe | type[Detector]] = {  # kdcli.plugins adds a user's own
    recipe.name: recipe for recipe in (GFL, RETINANET, ATSS, FCOS, FASTER_RCNN)
}
NAMES = (*DETECTORS, *TORCHVISION, MM_FASTER_RCNN.name)  # the latter: with the conventions of converted weights
DEFAULT_LR = 0.01  # for 16 images a step: mmdet's of every dense detector here
# Up to here a detector takes under 1 GB whatever else its spec says; beyond, its size is looked at before it is built.
ORDINARY = {"num_classes": 2000, "fpn_channels": 1024, "tower_convs": 16, "head_channels": 4096, "reg_max": 128}
YOURS = "if it is yours, name its file with kdcli --plugin FILE"


def detector_names() -> tuple[str, ...]:
    """Every detector that ``--model`` takes: kdcli's, then those of plugins."""
    return tuple(dict.fromkeys((*NAMES, *DETECTORS)))


def model_names() -> list[str]:
    """Every ``<detector>_<backbone>``."""
    return [f"{detector}_{backbone}" for detector in detector_names() for backbone in BACKBONES]


def parse_model_name(name: str) -> tuple[str, str]:
    """Split ``gfl_resnet18`` into ``("gfl", "resnet18")``. Raises OptionError with the nearest name."""
    for detector in detector_names():
        backbone = name.removeprefix(f"{detector}_")
        if backbone != name and backbone in BACKBONES:
            return detector, backbone
    if name.startswith(f"{MM_FEATURES}_"):  # of a converted file alone
        raise OptionError(f"model '{name}': {without_head(name)}")
    begun = [known for known in model_names() if known.startswith(name)]  # "gfl": a hundred names are no answer
    similar = f"; did you mean '{begun[0]}'?" if begun else did_you_mean(name, model_names())
    similar = similar if "did you mean" in similar else ";"
    raise OptionError(f"model '{name}': unknown{similar} `kdcli models` lists them ({YOURS})")


def family_of(detector: str) -> str:
    """The detector whose method defaults ``detector`` takes: what its recipe was made from (``tv_fcos``: ``fcos``)."""
    recipe = _recipe_named(detector)
    return recipe.family if isinstance(recipe, (Recipe, TwoStageRecipe)) and recipe.family else detector


def default_keys(detector: str) -> tuple[str, str]:
    """The names under which a method may have defaults for ``detector``: its own, then its family's."""
    return detector, family_of(detector)


def default_lr(detector: str) -> float:
    """``optim.lr`` for 16 images a step where the user names none: 0.01, and 0.02 for mmdet's Faster R-CNN."""
    recipe = _recipe_named(detector)
    return recipe.lr if isinstance(recipe, TwoStageRecipe) else DEFAULT_LR


def recipe_of(spec: ModelSpec) -> Recipe | TwoStageRecipe:
    """The recipe of ``spec``: of its detector, FCOS variant, box branch and box loss.

    Raises OptionError on an unknown detector and on a box loss that it cannot have.
    """
    if spec.detector not in DETECTORS:
        similar = did_you_mean(spec.detector, detector_names())
        if "did you mean" in similar:
            raise OptionError(f"detector '{spec.detector}': unknown{similar} ({YOURS})")
        raise OptionError(f"detector '{spec.detector}' is unknown; {YOURS}")
    recipe = FCOS_PLAIN if spec.fcos == "plain" else DETECTORS[spec.detector]
    assert not isinstance(recipe, type)  # a user's class has no recipe: _build does not ask for it
    return with_options(recipe, spec) if isinstance(recipe, Recipe) else recipe


def build_detector(spec: ModelSpec, backbone_weights: str = "none") -> Detector:
    """The detector of ``spec`` in train mode, on the CPU, with random weights from torch's global generator.

    backbone_weights: ``none``, ``imagenet`` (downloaded by torchvision) or the path of a torchvision state dict.
    ``spec.bn`` of ``auto`` becomes ``train`` without and ``norm_eval`` with pretrained weights. Raises OptionError on
    unknown names and weights of another backbone, MissingPathError on weights that are not there.
    A user's class is built as ``cls(spec)``.
    """
    if spec.bn == "auto":
        spec = replace(spec, bn="train" if backbone_weights == "none" else "norm_eval")
    detector = _build(spec)
    if backbone_weights != "none":
        backbone = getattr(detector, "backbone", None)
        if not isinstance(backbone, Backbone):
            raise OptionError(
                f"detector '{spec.detector}' has no attribute backbone of kdcli.detectors.backbones.Backbone to load "
                "pretrained weights into; leave --backbone-weights out"
            )
        load_backbone_weights(backbone, backbone_weights)
    return detector


def build_to_fill(spec: ModelSpec, weights: Mapping[str, Tensor]) -> Detector:
    """``build_detector`` of a spec that came with ``weights`` out of a file; draws nothing from torch's global generator.

    Raises OptionError, too, when they could not fill it: a file of 4 kB may speak of 10^9 channels.
    """
    with torch.random.fork_rng(devices=[]):
        own = isinstance(_recipe_named(spec.detector), type)  # a user's class may not know the device meta
        if not own and any((getattr(spec, name) or 0) > most for name, most in ORDINARY.items()):
            _require_enough(spec, weights)
        return build_detector(spec)


def _require_enough(spec: ModelSpec, weights: Mapping[str, Tensor]) -> None:
    given = count_elements(weights.values())
    wanted = max(getattr(spec, name) or 0 for name in ORDINARY)
    if wanted <= given and spec.tower_convs <= len(weights):  # else its modules alone would take minutes
        with torch.device("meta"):
            wanted = count_elements(build_detector(replace(spec, bn="train")).state_dict().values())
    if wanted > given or spec.tower_convs > len(weights):
        sizes = ", ".join(f"{name} = {getattr(spec, name)}" for name in ORDINARY)
        raise OptionError(f"its weights are {given} numbers, too few for a {spec.name} of {sizes}; the file is damaged")


def _recipe_named(detector: str) -> Recipe | TwoStageRecipe | type[Detector] | None:
    return {**TORCHVISION, MM_FASTER_RCNN.name: MM_FASTER_RCNN, **DETECTORS}.get(detector)


def _build(spec: ModelSpec) -> Detector:
    if spec.detector in TORCHVISION:
        return build_torchvision(spec)
    if spec.detector == MM_FASTER_RCNN.name:
        return TwoStageDetector(spec, MM_FASTER_RCNN)
    if spec.detector == MM_FEATURES:
        return FeaturesDetector(spec)
    own = DETECTORS.get(spec.detector)
    if isinstance(own, type):
        return _build_class(spec, own)
    recipe = recipe_of(spec)
    return TwoStageDetector(spec, recipe) if isinstance(recipe, TwoStageRecipe) else DenseDetector(spec, recipe)


def _build_class(spec: ModelSpec, cls: type[Detector]) -> Detector:
    detector = cls(spec)
    for name in ("spec", "grid", "assigner", "region_defaults"):
        if not hasattr(detector, name):
            raise OptionError(f"detector '{spec.detector}': {cls.__name__}.__init__ does not set self.{name}")
    return detector
