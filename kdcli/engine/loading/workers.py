"""Data workers as processes: what of them fails reaches the process that asked as one line, and none outlives it.

torch tells of a worker's death wherever the process happens to be, prints what a worker cannot send and waits for it for
ever, and its workers look for their parent only while they have nothing to do.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import queues
from typing import Any, TypeVar, cast

from torch.utils.data import DataLoader

from kdcli.errors import KDError, NoSpaceError, WorkerError
from kdcli.processes import end_now, end_with

T = TypeVar("T")
# what a worker is at, e.g. " while it read x.jpg", or ""; must not hold the loader, whose workers would then live for ever
Doing = Callable[[int], str]
SHARED_MEMORY = "/dev/shm"  # where torch puts the tensors that travel, on Linux
AHEAD = 4  # batches that a worker makes ahead
HELD = 2  # batches that the process has: the one it works on, and the next
MORE_SHARED = "start the container with a larger --shm-size, or use --workers 0"


def attempt(work: Callable[..., T], *arguments: Any) -> T | KDError | OSError:
    """``work(*arguments)``, or what a person can do something about, as a value: raised in a worker it becomes a traceback."""
    try:
        return work(*arguments)
    except (KDError, OSError) as error:
        return error
    except (MemoryError, RuntimeError) as error:
        told = _told(error)
        if told is None:
            raise
        return told


def _told(error: BaseException) -> KDError | None:
    """An error of torch's that a person can do something about; None for any other."""
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return WorkerError("a data worker has no memory left; use fewer --workers, a smaller --batch, or --workers 0")
    if "Too many open files" in text:
        return WorkerError("the data workers may not open more files; raise `ulimit -n`, or use --workers 0")
    if "shared memory" in text or "/torch_" in text:
        return NoSpaceError(
            f"{SHARED_MEMORY} has {_megabytes(free_shared_memory() or 0)} left, too little for a batch of the data workers: "
            f"{MORE_SHARED} ({' '.join(text.split())[:120]})"
        )
    return None


def begin(worker: int) -> None:
    """``worker_init_fn``: end with the process that asked, leave signals of a terminal to it, and send every error."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    end_with(parent.join)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # what its thread cannot send (no shared memory, no more files) it would print, and the process would wait for it
    cast(Any, queues.Queue)._on_queue_feeder_error = _send_error


def _send_error(queue: Any, error: BaseException, sent: tuple[int, Any]) -> None:
    """In place of batch ``sent[0]``: why it cannot be sent."""
    if isinstance(sent[1], BaseException):  # not even that
        end_now()
    told = error if isinstance(error, OSError) and error.filename else _told(error)
    text = " ".join(str(error).split())[:200]
    queue.put((sent[0], told or WorkerError(f"a data worker cannot send a batch ({text}); use --workers 0")))


def batches_ahead(batch_bytes: int, workers: int) -> int:
    """How many batches of ``batch_bytes`` in shared memory each worker may make ahead: fewer where they would not fit.

    Raises NoSpaceError when not even one of each fits.
    """
    free = free_shared_memory()
    if free is None or batch_bytes == 0:
        return AHEAD
    workers *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # those of the processes beside this one
    fit = (free // batch_bytes - HELD) // workers
    if fit < 1:
        raise NoSpaceError(
            f"{SHARED_MEMORY} has {_megabytes(free)} free, {workers} data workers need {workers + HELD} batches of "
            f"{_megabytes(batch_bytes)} there: {MORE_SHARED}, fewer --workers or a smaller --batch"
        )
    if fit < AHEAD:
        warnings.warn(
            f"{SHARED_MEMORY} has {_megabytes(free)} free: each data worker makes {fit} instead of {AHEAD} batches of "
            f"{_megabytes(batch_bytes)} ahead; a larger --shm-size lets it make more",
            stacklevel=2,
        )
    return min(AHEAD, fit)


def free_shared_memory() -> int | None:
    """Free bytes where tensors travel; None when the system has no such folder, or does not say."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def made_by(loader: DataLoader[Any], doing: Doing = lambda worker: "") -> Iterator[Any]:
    """What the workers of ``loader``, which have begun with ``begin``, make; without workers, what it makes here.

    Raises the error that a worker sent as a value, and WorkerError with what it was ``doing`` when one dies or none can
    be started.
    """
    for made in loader if loader.num_workers == 0 else _ahead(loader, doing):
        if isinstance(made, KDError | OSError):
            raise made
        yield made


def _ahead(loader: DataLoader[Any], doing: Doing) -> Iterator[Any]:
    try:
        multiprocessing.Lock()  # fails here where torch's own would leave half an iterator, which complains as it goes
        found = _waited_for(lambda: iter(loader))
        _running[found] = doing
        _take_over()
    except WorkerError:
        raise
    except OSError as error:
        raise WorkerError(
            f"{loader.num_workers} data workers cannot be started ({error.strerror or error}): use fewer --workers, or "
            f"--workers 0; they need processes, files and {SHARED_MEMORY}"
        ) from error
    except RuntimeError as error:  # one of the last pass is dead
        raise _death() or error from error
    while True:
        try:
            made = _waited_for(lambda: next(found))
        except StopIteration:
            return
        except WorkerError:
            raise
        except (RuntimeError, OSError, EOFError) as error:
            raise _death() or _told(error) or error from error
        yield made


_running: weakref.WeakKeyDictionary[Any, Doing] = weakref.WeakKeyDictionary()  # iterators of torch
_waiting = False
_taken_over: Any = None  # the handler that was there


def _waited_for(work: Callable[[], T]) -> T:
    """``work()``. The death of a worker is told here alone: torch would raise it in the middle of anything."""
    global _waiting
    _waiting = (
        threading.current_thread() is threading.main_thread()
    )  # where signals arrive; elsewhere torch looks, each 5 s
    try:
        if death := _death():
            raise death
        return work()
    finally:
        _waiting = False


def _take_over() -> None:
    """Be asked when a child dies, and pass it on to torch when it is none of ours."""
    global _taken_over
    handler = signal.getsignal(signal.SIGCHLD)
    if handler is not _on_child and threading.current_thread() is threading.main_thread():
        _taken_over = handler
        signal.signal(signal.SIGCHLD, _on_child)


def _on_child(number: int, frame: Any) -> None:
    if _with_dead() is None:
        if callable(_taken_over):
            _taken_over(number, frame)
    elif _waiting:  # perhaps in the middle of a batch, whose rest will never come
        raise _death() or AssertionError


def _with_dead() -> tuple[Any, int] | None:
    """An iterator with a worker that has ended and should not have, and which one."""
    for found in list(_running):
        for worker, process in enumerate(() if found._shutdown else found._workers):
            if process.exitcode not in (None, 0):
                return found, worker
    return None


def _death() -> WorkerError | None:
    """What to say of a dead worker. The others of its loader end too: they may hold the pipe that it wrote to."""
    global _waiting
    dead = _with_dead()
    if dead is None:
        return None
    _waiting = False
    found, worker = dead
    error = WorkerError(_obituary(found._workers[worker].exitcode, _running[found](worker)))
    for process in found._workers:
        process.kill()
    for process in found._workers:
        process.join()
    found._shutdown_workers()
    del _running[found]
    return error


def _obituary(code: int, at: str) -> str:
    if code > 0:
        return f"a data worker ended with exit code {code}{at}; see more with --workers 0"
    why = {
        signal.SIGBUS: f"{SHARED_MEMORY} is too small: {MORE_SHARED}",
        signal.SIGKILL: "probably for memory: use fewer --workers, a smaller --batch, or --workers 0",
    }.get(signal.Signals(-code), "see more with --workers 0")
    return f"a data worker was killed by signal {-code} ({signal.strsignal(-code)}){at}: {why}"


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.1f} MB"
