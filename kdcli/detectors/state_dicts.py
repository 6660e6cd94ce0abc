"""The weights in a file of another library: out of the dictionary around them, without the prefixes of wrappers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeGuard

from torch import Tensor

from kdcli.errors import OptionError

# where training loops keep a model's weights: mmcv and Lightning; torchvision's references and others
KEYS = ("state_dict", "model", "model_state_dict", "model_state")
_LONGEST = 400  # characters of a weight's name; its numbers become int
_WRAPPERS = re.compile(r"(?:module|_orig_mod|model)\.")  # DDP, torch.compile, modules that hold the model as `model`
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")  # torch.compile, of a part too


def is_state_dict(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Names to tensors, and at least one of them."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and isinstance(item, Tensor) for name, item in value.items())
    )


def weights_in(content: object) -> tuple[dict[str, Tensor], list[str]]:
    """(state dict, what lies beside it) of ``content``, a file as ``files.load_torch`` reads it, compiled or not.

    Raises OptionError for what holds no state dict, by its name where it has one.
    """
    if is_state_dict(content):
        return _uncompiled(content), []
    if isinstance(content, Mapping):
        for key in KEYS:
            inner = content.get(key)
            if is_state_dict(inner):
                return _uncompiled(inner), [str(other)[:40] for other in content if other != key]
    raise OptionError(name_content(content))


def name_content(content: object) -> str:
    """What ``content`` is that holds no weights of another library."""
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__}"
    if is_said(content.get("format"), "kdcli.checkpoint"):
        return "it is a checkpoint of kdcli: give it to --init-from or --teacher as it is"
    if {"progress", "module", "optimizer"} <= content.keys():
        return "it is the state of a run of kdcli, which --resume reads; the weights are in last.pt beside it"
    if {"state", "param_groups"} <= content.keys() or set(content) == {"optimizer"}:
        return "it is an optimiser's state without the weights of a model"
    if not content:
        return "it is empty"
    return f"it has {', '.join(repr(str(key)[:40]) for key in list(content)[:5])}"


def name_checkpoint(content: object) -> str:
    """What stands in the place of a checkpoint of kdcli, and where it belongs."""
    if isinstance(content, Mapping):
        state = next((content[key] for key in KEYS if is_state_dict(content.get(key))), content)
        if is_state_dict(state):
            if any(name.endswith(("roi_heads.box_predictor.cls_score.bias", "cls_logits.bias")) for name in state):
                return "a detector of torchvision: make it one with kdcli convert --from torchvision"
            if any(name.endswith("backbone.conv1.weight") for name in state):
                return "a detector of mmdet: make it one with kdcli convert --from mmdet"
            return "a backbone goes to --backbone-weights"
    return name_content(content)


def is_said(value: object, expected: str | int) -> bool:
    """Whether a value out of a file, which may be a tensor or true for 1, is the ``expected`` one."""
    return type(value) is type(expected) and value == expected


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without the prefixes ``module.`` and ``model.`` that all of its names have."""
    plain = dict(state)
    while plain and (match := _WRAPPERS.match(next(iter(plain)))) and all(name.startswith(match[0]) for name in plain):
        plain = {name.removeprefix(match[0]): value for name, value in plain.items()}
    return plain


def _uncompiled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if (longest := max(map(len, state))) > _LONGEST:
        raise OptionError(f"it has a name of {longest} characters, which no module of PyTorch gives")
    plain = {_COMPILED.sub("", name): value for name, value in state.items()}
    if len(plain) < len(state):
        raise OptionError("it holds a compiled and a plain model: some names differ in '_orig_mod.' alone")
    return plain
