"""Training on several processes: ``torchrun --nproc-per-node N -m kdcli train ...``, one process a GPU (or gloo on CPUs).

The first process alone writes files and talks; the others compute. Everything that a loss divides by, or switches on, is
over the global batch (tensors.world_sum, world_mean), so that N processes train as one with the same batch does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdcli.errors import OptionError
from kdcli.limits import MAX_PROCESSES
from kdcli.processes import end_with, parent_gone
from kdcli.shown import shown
from kdcli.tensors import world_size

T = TypeVar("T")

TORCHRUN = "start with torchrun, which sets what is needed, or unset WORLD_SIZE, RANK and LOCAL_RANK"
TIMEOUT = timedelta(hours=2)  # the others wait while the first scores detections and writes


class Started(NamedTuple):
    """A process among those that were started together."""

    rank: int
    world: int


@contextmanager
def joined(device: str = "auto") -> Iterator[bool]:
    """Join the processes that torchrun started, for the time of the block; yields True in the first (or only) one.

    They end with torchrun. Raises OptionError when there are more processes than GPUs on this machine, and when the variables
    that torchrun sets cannot be of it, or name a place where the processes do not meet.
    """
    if started_as().world == 1:
        yield True
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:  # the parent is torchrun, whose end nobody else would tell us
        parent = os.getppid()
        end_with(lambda: parent_gone(parent))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise OptionError(f"WORLD_SIZE is set and {name} is not: {TORCHRUN}")
    if not 0 < _whole("MASTER_PORT", 0) < 65_536:
        raise OptionError(f"MASTER_PORT = {os.environ['MASTER_PORT']}: a port is from 1 to 65535; {TORCHRUN}")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        take_local_gpu()
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = " ".join(str(error).split())[:150]
        raise OptionError(f"the processes cannot meet at MASTER_ADDR:MASTER_PORT {where} ({reason})") from error
    try:
        yield is_main()
    finally:
        dist.destroy_process_group()


def started_as() -> Started:
    """Which of how many processes this one is, as torchrun's variables say; the only one without them.

    Raises OptionError for what is no number, for half of them, and for a rank beyond the number of processes.
    """
    world, rank = _whole("WORLD_SIZE", 1), _whole("RANK", 0)
    if not 1 <= world <= MAX_PROCESSES:
        raise OptionError(f"WORLD_SIZE = {world}: from 1 to {MAX_PROCESSES:,} processes; {TORCHRUN}")
    if world > 1 and "RANK" not in os.environ:
        raise OptionError(f"WORLD_SIZE is {world} and RANK is not set: {TORCHRUN}")
    if rank >= world:
        of = f"of {world}" if "WORLD_SIZE" in os.environ else "and WORLD_SIZE is not set"
        raise OptionError(f"RANK is {rank}, {of}: {TORCHRUN}")
    return Started(rank, world)


def _whole(name: str, default: int) -> int:
    """A variable of torchrun. Raises OptionError for what is no whole number of at least 0."""
    text = os.environ.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,9}", text):
        raise OptionError(f"the environment has {name} = {shown(text)}, which is no number of a process; {TORCHRUN}")
    return int(text)


def take_local_gpu() -> None:
    """Under torchrun, let ``cuda`` mean this process's own GPU. Raises OptionError with more processes than GPUs here."""
    local = _whole("LOCAL_RANK", 0)
    if local >= torch.cuda.device_count():
        raise OptionError(
            f"torchrun started process {local} of this machine, which has {torch.cuda.device_count()} GPU(s); "
            "use --nproc-per-node with at most that many"
        )
    torch.cuda.set_device(local)


def is_main() -> bool:
    """True in the process that writes files."""
    return world_rank() == 0


def world_rank() -> int:
    """Number of this process, 0 outside torchrun."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def from_main(value: T) -> T:
    """What the first process has, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gathered(values: list[T]) -> list[T]:
    """The lists of all processes joined, in every process."""
    if world_size() == 1:
        return values
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def share_batch_norm(student: nn.Module, mode: str, device: torch.device) -> None:
    """With ``model.bn=sync``, let batch norms take their statistics over all processes, in place.

    Raises OptionError on several CPU processes: PyTorch's SyncBatchNorm runs on GPUs alone.
    """
    if mode != "sync" or world_size() == 1:
        return
    if device.type != "cuda":
        raise OptionError("model.bn=sync needs GPUs: on several CPU processes use --set model.bn=train or norm_eval")
    nn.SyncBatchNorm.convert_sync_batchnorm(student)


def take_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite ``tensors`` with those of the first process: what it evaluates and exports is then everyone's."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


def synchronised(module: nn.Module, device: torch.device) -> nn.Module:
    """``module`` as every process shall call it: gradients are averaged over them."""
    if world_size() == 1:
        return module
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)
