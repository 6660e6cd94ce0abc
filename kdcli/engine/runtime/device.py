"""Device, precision, threads and memory: what ``--device``, ``--amp``, ``--threads`` and ``--workers`` mean here."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from kdcli.errors import OptionError, nearest

P = ParamSpec("P")
T = TypeVar("T")
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
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
        raise OptionError(f"--amp '{name}'{nearest(name, ['auto', *AMP])}")
    if name == "fp16" and device.type != "cuda":
        raise OptionError("--amp fp16 needs a GPU; on a CPU use fp32 or bf16")
    return AMP[name]


def pick_workers(workers: int | None) -> int:
    """Data processes: as asked, else one for each spare core, at least one and at most eight."""
    if workers is not None:
        return workers
    return max(1, min(8, usable_cores() - 1))


def pick_teacher_workers(workers: int | None, device: torch.device) -> int:
    """``pick_workers`` for a teacher; none beside one on a CPU, whose threads want every core.

    A data process takes a core away from one of its threads, and the others wait: on two cores MobileNetV2 took 39 ms an image
    beside one, and 31 to 36 when images were loaded between its passes.
    """
    return 0 if workers is None and device.type == "cpu" else pick_workers(workers)


class Here(Executor):
    """Does each task at once, in the thread that asks; an error is raised there too."""

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """A future that is done."""
        found: Future[T] = Future()
        found.set_result(function(*args, **kwargs))
        return found


@contextlib.contextmanager
def helper_threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads in which torch has one thread each; after an error, what has not begun is dropped.

    Each would start as many of torch's own as there are cores, beside those of the others, and ``cache-teacher`` took 1.20
    times the bare teacher's time on two cores instead of 1.10.
    """
    with ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            # what later threads start with. As many as this thread has now, since a generator that is given up ends whenever
            # Python collects it: what it had at its start would change the bits of whatever runs then
            torch.set_num_threads(torch.get_num_threads())


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def set_threads(threads: int | None) -> int:
    """Set the CPU threads of this process and return their number; convolutions round differently with another one."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def keep_freed_memory(device: torch.device) -> None:
    """For a process in which a detector only infers, on a CPU: what one pass frees is kept for the next.

    glibc gives it back to the system instead and asks for it again, page by page: 70,000 page faults for 8 images of
    MobileNetV2 at 256x320. ``cache-teacher`` took 7.4 s without this and 5.9 s with it, for 192 rows on two cores: the same
    store, 5 % more memory. Training steps gain 0 to 4 % and are left alone: their tensors differ in size from step to
    step. Does nothing on a GPU, or with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if device.type == "cpu" and mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def make_deterministic() -> None:
    """``--deterministic``: no TF32, and only algorithms that give the same bits twice."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak: a process may do several runs, and a child inherits its parent's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux alone has it; elsewhere the peak is the process's
            CLEAR_REFS.write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of this process: allocated GPU memory, or resident memory on a CPU (data workers not counted)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if STATUS.is_file():
        peak = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, kB elsewhere
    return maximum if sys.platform == "darwin" else maximum * 1024
