"""Device, precision and determinism: what ``--device``, ``--amp`` and ``--deterministic`` mean here."""

from __future__ import annotations

import torch

from kdcli.errors import OptionError, did_you_mean

AMP = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one. Raises OptionError for a device that is not there."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())  # under torchrun each process has its own
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device '{name}' is not a device; choose from auto, cpu, cuda, cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"--device {name}: this PyTorch sees no GPU; use --device cpu")
    return device


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """``auto``: float32 on a CPU, bfloat16 on a GPU. None is float32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    if name not in AMP:
        raise OptionError(f"--amp '{name}'{did_you_mean(name, ['auto', *AMP])}")
    if name == "fp16" and device.type != "cuda":
        raise OptionError("--amp fp16 needs a GPU; on a CPU use fp32 or bf16")
    return AMP[name]


def make_deterministic() -> None:
    """``--deterministic``: no TF32, and only algorithms that give the same bits twice."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
