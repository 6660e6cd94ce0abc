"""Whether a state file fits the run that is to go on from it: names, kinds and shapes of every part, before one is loaded.

The digest finds damage. A state from before digests has none, and one of another run may be whole: PyTorch would take buffers
that are too short, and read beyond them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.engine.training.optim import WeightAverage
from kdcli.errors import OptionError

PARTS = ("version", "progress", "module", "optimizer", "scaler", "average", "rng", "cuda_rng")
SINCE_DIGESTS = ("run", "seen", "digest")  # either all or none of them are there

# what an optimiser keeps of each parameter; all are of its shape, but AdamW's count of steps
BUFFERS = {"SGD": {"momentum_buffer"}, "AdamW": {"exp_avg", "exp_avg_sq", "step"}}

# of a row of results.csv, and of the sums of an epoch that has begun: what the end of the epoch and of the run read
ROW_FIELDS = ("epoch", "epoch_s", "images_per_s", "data_wait_percent")
SUM_FIELDS = ("seconds", "wait_s", "teacher_s", "images", "steps")


def require_parts(
    state: Mapping[str, Any], step: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    average: WeightAverage | None,
) -> None:  # fmt: skip
    """Raises OptionError for a part that is missing, or is not of this module, optimiser, scaler or average."""
    later = [name for name in SINCE_DIGESTS if name in state]
    if (
        set(state) - {*PARTS, *SINCE_DIGESTS}
        or not set(PARTS) <= set(state)
        or len(later) not in (0, len(SINCE_DIGESTS))
    ):
        raise OptionError("its parts are not those that kdcli writes")
    if later and not isinstance(state["seen"], dict):
        raise OptionError("its list of images that were read is none")
    _same_tensors(state["module"], step.state_dict(), "student")
    saved = state["average"]
    if (saved is None) != (average is None):
        raise OptionError(
            f"it has {'no' if saved is None else 'an'} average of the weights, the run {'an' if average else 'none'}"
        )
    if average is not None:
        if not isinstance(saved, dict) or set(saved) != {"state", "updates"} or not _natural(saved["updates"]):
            raise OptionError("its average of the weights is none")
        _same_tensors(saved["state"], average.state, "average")
    _same_optimizer(state["optimizer"], optimizer)
    scale, ours = state["scaler"], scaler.state_dict()
    if not isinstance(scale, dict) or set(scale) != set(ours) or not all(map(_number, scale.values())):
        raise OptionError("its gradient scale is not one of this run's --amp")
    _random_states(state["rng"], state["cuda_rng"])


def require_progress(progress: object, epochs: int) -> dict[str, Any]:
    """``progress`` as the fields of a TrainingState for a run of ``epochs``. Raises OptionError for what is none."""
    kinds: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(("epoch", "batch", "step", "peak_memory_bytes"), _natural),
        "wall_s": _number,
        "best_ap": lambda v: v is None or _number(v),
        "best_epoch": lambda v: v is None or _natural(v),
        "history": lambda v: type(v) is list and all(map(_row, v)),
        "sums": _numbers,
        "shares": _numbers,
        "zeros": lambda v: _numbers(v) and all(map(_natural, v.values())),
        "checked": lambda v: type(v) is list and all(type(name) is str for name in v),
    }
    if not isinstance(progress, dict) or set(progress) != set(kinds):
        raise OptionError("its progress does not have the fields that kdcli writes")
    for name, check in kinds.items():
        if not check(progress[name]):
            raise OptionError(f"its {name} is no value of that field")
    if progress["epoch"] != len(progress["history"]) or progress["epoch"] > epochs:
        raise OptionError(f"it has {progress['epoch']} of {epochs} epochs, and results of {len(progress['history'])}")
    sums = progress["sums"]
    if progress["batch"] and not (set(SUM_FIELDS) <= set(sums) and sums["steps"] > 0 and sums["seconds"] > 0):
        raise OptionError("its sums of the epoch are not complete")
    return progress


def _same_tensors(saved: object, ours: Mapping[str, Tensor], what: str) -> None:
    if not isinstance(saved, dict):
        raise OptionError(f"its {what} is no table of tensors")
    for name in [*saved, *ours]:
        here, there = ours.get(name), saved.get(name)
        if here is None or not _like(there, here.shape, here.dtype):
            raise OptionError(f"it is of another {what} ({str(name)[:60]}: {_shown(there)}, the run's {_shown(here)})")


def _same_optimizer(saved: object, optimizer: torch.optim.Optimizer) -> None:
    name, ours = type(optimizer).__name__, optimizer.state_dict()
    if not isinstance(saved, dict) or set(saved) != set(ours) or not isinstance(saved["state"], dict):
        raise OptionError("its optimiser is none")
    groups = saved["param_groups"]
    if not isinstance(groups, list) or list(map(_members, groups)) != list(map(_members, ours["param_groups"])):
        raise OptionError("its optimiser is of other parameters")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, buffers in saved["state"].items():
        if type(number) is not int or not 0 <= number < len(parameters):
            raise OptionError("its optimiser is of other parameters")
        if not isinstance(buffers, dict) or set(buffers) != BUFFERS[name]:
            raise OptionError(f"its optimiser is not {name}")
        for buffer, value in buffers.items():
            parameter = parameters[number]
            shape = torch.Size(()) if buffer == "step" else parameter.shape
            if not _like(value, shape, torch.float32 if buffer == "step" else parameter.dtype):
                raise OptionError(
                    f"{buffer} of parameter {number} is {_shown(value)}, the parameter {_shown(parameter)}"
                )


def _members(group: object) -> list[int] | None:
    numbers = group.get("params") if isinstance(group, dict) else None
    return numbers if isinstance(numbers, list) and all(type(n) is int for n in numbers) else None


def _random_states(rng: object, cuda_rng: object) -> None:
    states = [rng, *cuda_rng] if isinstance(cuda_rng, list) else [None]
    if not all(isinstance(s, Tensor) and s.dtype == torch.uint8 and s.ndim == 1 for s in states):
        raise OptionError("its random state is none")
    try:
        torch.Generator().set_state(rng)  # type: ignore[arg-type]  # PyTorch alone knows what is in it
        if torch.cuda.is_available():
            for state in cuda_rng:  # type: ignore[attr-defined]
                torch.Generator("cuda").set_state(state)
    except RuntimeError as error:
        raise OptionError(f"its random state is none ({' '.join(str(error).split())[:80]})") from error


def _like(value: object, shape: torch.Size, dtype: torch.dtype) -> bool:
    return (
        isinstance(value, Tensor) and value.shape == shape and value.dtype == dtype and value.layout == torch.strided
        and value.device.type == "cpu"
    )  # fmt: skip


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "missing" if value is None else f"a {type(value).__name__}"


def _number(value: object) -> bool:
    return type(value) in (int, float)


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _numbers(value: object) -> bool:
    return isinstance(value, dict) and all(type(name) is str and _number(v) for name, v in value.items())


def _row(value: object) -> bool:
    return (
        isinstance(value, dict) and all(type(name) is str and (v is None or _number(v)) for name, v in value.items())
        and all(_number(value.get(name)) for name in ROW_FIELDS)
    )  # fmt: skip
