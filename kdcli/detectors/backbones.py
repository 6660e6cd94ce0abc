"""Torchvision classifiers cut into the three feature maps that a neck reads: C3, C4, C5 at strides 8, 16, 32.

Each is listed as four runs of torchvision submodules: everything up to stride 4, then one run per map. A map is the
last output of its stride. MobileNets end after their final 1x1 conv, which widens 320 (160, 96) channels to 1280 (960,
576), as torchvision's own detectors have them, but for ``mobilenet_v2_leaky``; ShuffleNet's conv5, a submodule outside
its stages, is left out. The modules keep torchvision's names, so its checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from kdcli.detectors.base import BatchNormMode, Dcn
from kdcli.detectors.deformable import use_deformable
from kdcli.detectors.soundness import require_same_kinds, require_sound
from kdcli.detectors.state_dicts import unwrapped, weights_in
from kdcli.errors import MissingPathError, OptionError, did_you_mean
from kdcli.files import load_torch

# what mmengine's table of model URLs calls open-mmlab://resnext101_32x4d; mmdet loads it by torchvision's names
OPEN_MMLAB = "https://download.openmmlab.com/pretrain/third_party/resnext101_32x4d-a5af3160.pth"
LEAK = 0.1  # act_cfg of BCKD's MobileNetV2: LeakyReLU, negative_slope 0.1


@dataclass(frozen=True)
class Layout:
    """runs: paths of the torchvision submodules that lead to strides 4, 8 (C3), 16 (C4) and 32 (C5), in order. make: the
    classifier that they are cut from, with random weights; None: torchvision's of that name. weights_of: the network of
    torchvision whose ImageNet weights it takes; None: of its own name.
    """

    runs: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    make: Callable[[], nn.Module] | None = None
    weights_of: str | None = None


def _features(*ends: int, make: Callable[[], nn.Module] | None = None, weights_of: str | None = None) -> Layout:
    """A MobileNet: its ``features`` cut before the indices ``ends``."""
    starts = (0, *ends[:-1])
    a, b, c, d = (tuple(f"features.{k}" for k in range(low, high)) for low, high in zip(starts, ends, strict=True))
    return Layout((a, b, c, d), make, weights_of)


def _resnext101_32x4d() -> nn.Module:
    """ResNeXt-101 with 32 groups of 4 channels (arXiv 1611.05431), which mmdet's configs use and torchvision lacks."""
    model: nn.Module = ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4)
    return model


def _leaky_mobilenet_v2() -> nn.Module:
    """MobileNetV2 (arXiv 1801.04381) with a leaky relu, of slope 0.1 below 0, wherever it has a relu6."""
    model: nn.Module = torchvision.models.mobilenet_v2()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.LeakyReLU(LEAK, inplace=True))
    return model


_RESNET = Layout((("conv1", "bn1", "relu", "maxpool", "layer1"), ("layer2",), ("layer3",), ("layer4",)))
_SHUFFLENET = Layout((("conv1", "maxpool"), ("stage2",), ("stage3",), ("stage4",)))

BACKBONES: dict[str, Layout] = {
    "resnet18": _RESNET,
    "resnet34": _RESNET,
    "resnet50": _RESNET,
    "resnet101": _RESNET,
    "resnet152": _RESNET,
    "resnext101_32x4d": replace(_RESNET, make=_resnext101_32x4d),
    "resnext101_64x4d": _RESNET,
    # with the last 1x1 convolution (1280 channels), as torchvision's own detectors have it: the blood-cell teacher of
    # docs/results/bccd.md reached 53.5 AP with it and 51.1 on the 320 channels before it
    "mobilenet_v2": _features(4, 7, 14, 19),
    # BCKD's student: mmdet's MobileNetV2 with out_indices (1, 2, 4, 6), so that C5 has the 320 channels before that
    # convolution, and a leaky relu; its configuration starts from ImageNet weights of a relu6 likewise
    "mobilenet_v2_leaky": _features(4, 7, 14, 18, make=_leaky_mobilenet_v2, weights_of="mobilenet_v2"),
    "mobilenet_v3_small": _features(2, 4, 9, 13),
    "mobilenet_v3_large": _features(4, 7, 13, 17),
    "shufflenet_v2_x0_5": _SHUFFLENET,
    "shufflenet_v2_x1_0": _SHUFFLENET,
}


class Backbone(nn.Module):
    """``name`` of BACKBONES with random weights (torchvision's initialisation).

    bn: with ``norm_eval`` every batch norm stays in eval mode, so that its statistics are fixed while its scale and shift
    are trained, and the layers up to stride 4 (stem and, where it has one, first stage) get no gradient: mmdet 3.3.0's
    ResNet with ``norm_eval=True, frozen_stages=1`` and ``requires_grad=True`` in its norm_cfg. With ``frozen`` no batch
    norm gets a gradient either (``requires_grad=False``). Other modes fix nothing. stride_in_1x1, dcn: see
    ModelSpec; no other than a ResNet with bottlenecks. ``channels``: of C3, C4, C5;
    ``stage_channels``: of C2 too.
    """

    def __init__(
        self, name: str, *, bn: BatchNormMode = "train", stride_in_1x1: bool = False, dcn: Dcn = "none"
    ) -> None:
        super().__init__()
        if name not in BACKBONES:
            raise OptionError(f"backbone '{name}': unknown{did_you_mean(name, BACKBONES)}")
        self.name = name
        self.norm_eval = bn in ("norm_eval", "frozen")
        layout = BACKBONES[name]
        self._runs = layout.runs
        model = torchvision.models.get_model(name, weights=None) if layout.make is None else layout.make()
        if stride_in_1x1:
            _move_strides(model, name)
        if dcn != "none":
            use_deformable(model, name, dcn)
        whole = set(model.state_dict())
        for child, module in _used_children(model, self._runs):
            self.add_module(child, module)
        for activation in self.modules():
            if isinstance(activation, nn.Hardswish):
                activation.inplace = (
                    False  # its gradient needs what went in, so autograd copies it: 2 % of a training step
                )
        self.classifier_keys = frozenset(whole - set(self.state_dict()))  # in a classifier's file, not in a backbone
        self.stage_channels = self._probe_channels()
        self.channels = self.stage_channels[1:]
        if self.norm_eval:
            self._fix(scales=bn == "frozen")
            self.train()

    def forward(self, images: Tensor) -> list[Tensor]:
        """C3, C4, C5 of normalised ``images`` [B, 3, H, W]: [B, channels[k], ceil(H / stride), ceil(W / stride)]."""
        return self.stages(images)[1:]

    def stages(self, images: Tensor) -> list[Tensor]:
        """C2, C3, C4, C5 of normalised ``images`` [B, 3, H, W]; C2, of stride 4, is what Faster R-CNN's finest level is
        made from."""
        maps = []
        x = images
        for run in self._runs:
            for path in run:
                x = self.get_submodule(path)(x)
            maps.append(x)
        return maps

    def _fix(self, *, scales: bool) -> None:
        """No gradient for the layers up to stride 4 nor, with ``scales``, for any batch norm."""
        fixed = [self.get_submodule(path) for path in self._runs[0]]
        if scales:
            fixed += [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        for module in fixed:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        """As ``nn.Module.train``, but with fixed statistics the batch norms stay in eval mode."""
        super().train(mode)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def _probe_channels(self) -> tuple[int, ...]:
        with torch.no_grad():
            self.eval()  # so that the running statistics do not see the zeros
            channels = tuple(m.shape[1] for m in self.stages(torch.zeros(1, 3, 32, 32)))
            self.train()
        return channels


def load_backbone_weights(backbone: Backbone, source: str) -> None:
    """Fill ``backbone`` from ``source``: ``"imagenet"`` (torchvision's IMAGENET1K_V1 file, downloaded and its hash
    checked) or the path of a torchvision state dict, with or without its classifier.

    Raises MissingPathError when there is no such file or no network, OptionError naming the first keys when the file
    is of another network.
    """
    state = _imagenet(backbone.name) if source == "imagenet" else _state_dict(Path(source))
    own = backbone.state_dict()
    found, expected = set(state), set(own)
    # Files older than PyTorch 0.4.1 have no batch counters, and batch norm fills them in by itself; a classifier has no
    # deformable convolutions, and its file leaves their offsets at 0, as mmdet's configs start from it.
    missing = [
        k for k in sorted(expected - found) if not k.endswith("num_batches_tracked") and ".conv_offset." not in k
    ]
    surplus = sorted(found - expected - backbone.classifier_keys)
    shapes = [k for k in sorted(found & expected) if state[k].shape != own[k].shape]
    problems = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", missing), ("unexpected", surplus), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise OptionError(f"backbone weights '{source}' are not those of {backbone.name}: keys {'; '.join(problems)}")
    require_same_kinds(own, state, f"backbone weights '{source}'")
    backbone.load_state_dict({k: v for k, v in state.items() if k in expected}, strict=False)


def _move_strides(model: nn.Module, name: str) -> None:
    """Put the stride of each bottleneck into its first conv, of 1x1, as Caffe's ResNets have it (arXiv 1512.03385)."""
    blocks = [m for m in model.modules() if isinstance(m, Bottleneck)]
    if not blocks:
        raise OptionError(f"model.stride_in_1x1: backbone {name} has no bottlenecks; leave it out")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _used_children(model: nn.Module, runs: tuple[tuple[str, ...], ...]) -> list[tuple[str, nn.Module]]:
    """The direct children of ``model`` that ``runs`` name; a ``features`` sequence is cut after its last used block."""
    paths = [path for run in runs for path in run]
    used: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        count = sum(path.startswith(f"{name}.") for path in paths)
        if name in paths:
            used.append((name, child))
        elif count and isinstance(child, nn.Sequential):
            used.append((name, child[:count]))
    return used


def _imagenet(name: str) -> dict[str, Tensor]:
    source = BACKBONES[name].weights_of or name
    if source not in torchvision.models.list_models():
        raise OptionError(
            f"backbone weights 'imagenet': torchvision has none of {name}; give the path of a state dict in its names, "
            f"such as mmdet's open-mmlab://{name}: {OPEN_MMLAB}"
        )
    if str(torch.hub.get_dir()).startswith("~"):  # torch would make a folder of this name here
        raise OptionError(
            "backbone weights 'imagenet': there is no home folder to keep them in; set TORCH_HOME to a folder"
        )
    # V1, not V2 where there are two: what mmdet's and torchvision's own detectors start from.
    weights = torchvision.models.get_model_weights(source)["IMAGENET1K_V1"]
    try:
        state: dict[str, Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except OSError as error:  # URLError is one
        raise MissingPathError(
            f"backbone weights 'imagenet': cannot get {weights.url} ({error}); download it elsewhere and pass its path"
        ) from error
    except RuntimeError as error:  # a wrong hash
        raise OptionError(f"backbone weights 'imagenet': {weights.url}: {error}; try again") from error
    return state


def _state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise MissingPathError(f"backbone weights '{path}': no such file; write none, imagenet or the path of a file")
    content = load_torch(path, what="backbone weights", foreign=True)
    try:
        state = unwrapped(weights_in(content)[0])
    except OptionError as error:
        raise OptionError(
            f"backbone weights '{path}': not a torchvision state dict (names to tensors): {error}"
        ) from error
    require_sound(state, f"backbone weights '{path}'")
    return state
