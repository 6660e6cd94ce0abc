"""Cores, threads and data workers: what ``--threads`` and ``--workers`` mean here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def pick_workers(workers: int | None) -> int:
    """Data workers: as asked, else one for each spare core, at least one and at most eight."""
    if workers is not None:
        return workers
    return max(1, min(8, usable_cores() - 1))


def pick_teacher_workers(workers: int | None, device: torch.device) -> int:
    """``pick_workers`` for a teacher; none beside one on a CPU, whose threads want every core.

    A data worker takes a core away from one of its threads, and the others wait: on two cores MobileNetV2 took 39 ms an image
    beside one, and 31 to 36 when images were loaded between its passes.
    """
    return 0 if workers is None and device.type == "cpu" else pick_workers(workers)


class InlineExecutor(Executor):
    """Does each task at once, in the thread that asks; an error is raised there too."""

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """A future that is done."""
        found: Future[T] = Future()
        found.set_result(function(*args, **kwargs))
        return found


@contextlib.contextmanager
def thread_pool(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
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
