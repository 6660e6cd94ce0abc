"""Whether weights can be weights: dense tensors of finite numbers. What fails here trains and scores as noise otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from kdcli.errors import OptionError

_SHOWN = 60  # characters of a name


def require_sound(weights: Mapping[str, Tensor], where: str) -> None:
    """``require_plain`` and ``require_finite``."""
    require_plain(weights, where)
    require_finite(weights, where)


def require_plain(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise OptionError, which names the first tensor, for one that is not dense, real and all in memory.

    ``torch.zeros(1).expand(10**12)`` is 4 bytes of a file, and what is made from its shape 4 TB.
    """
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):  # whatever the file holds under 'weights'
            raise OptionError(f"{where}: holds {_shown(str(name))}, a {type(value).__name__}: not names and tensors")
        kind = _kind(value)
        if kind is not None:
            raise OptionError(f"{where}: {_shown(name)} is {kind}; save plain weights")


def require_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise OptionError, which names the first tensor, for plain weights that no training leaves behind.

    A NaN or an infinity, a variance below 0. Two passes over the numbers, 30 ms for the 32 million of a GFL-R50.
    """
    for name, value in weights.items():
        if not value.numel() or not value.is_floating_point():
            continue
        numbers = value.detach()
        if numbers.dtype not in (torch.float32, torch.float64):
            numbers = numbers.float()  # aminmax knows no 8-bit floats
        low, high = (float(number) for number in torch.aminmax(numbers))  # a NaN passes through both
        if not (math.isfinite(low) and math.isfinite(high)):
            found = "NaN" if math.isnan(low) else "an infinite number"
            raise OptionError(f"{where}: {_shown(name)} holds {found}; its training diverged, or the file is damaged")
        if low < 0 and name.endswith("running_var"):
            raise OptionError(f"{where}: {_shown(name)} holds a variance of {low:g}; the file is damaged")


def require_same_kinds(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: str) -> None:
    """Raise OptionError where one has whole numbers and the other has not: codes of quantised weights are no weights."""
    for name in own.keys() & weights.keys():
        if own[name].is_floating_point() != weights[name].is_floating_point():
            raise OptionError(f"{where}: {_shown(name)} is of {weights[name].dtype}; save plain weights")


def zero_kernels(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights of convs and linear layers that are 0 throughout: such a layer gives its bias everywhere."""
    return [name for name, value in weights.items() if value.ndim > 1 and value.numel() and not bool(value.any())]


def count_elements(weights: Iterable[Tensor]) -> int:
    """Numbers in all of them."""
    return sum(value.numel() for value in weights)


def _shown(name: str) -> str:
    return repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}...")


def _kind(value: Tensor) -> str | None:
    """What stands against reading ``value`` as numbers in memory; None: nothing."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}"
    if value.is_meta:
        return "a tensor without data (meta)"
    if value.is_quantized:
        return "quantised"
    if value.is_nested or value.layout != torch.strided:
        return "a nested tensor" if value.is_nested else "a sparse tensor"
    if value.is_complex():
        return "complex"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"a tensor of {value.numel()} elements, of which the file holds fewer"
    return None
