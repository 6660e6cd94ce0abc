"""What a data worker cannot do reaches the process that asked, in one line; and it ends with that process."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from kdcli.engine.caching.plan import plan_store
from kdcli.engine.loading import samples, workers
from kdcli.engine.loading.loader import Loader
from kdcli.engine.loading.samples import SampleSource
from kdcli.engine.loading.workers import attempt, batches_ahead, begin, made_by
from kdcli.engine.runtime.progress import NullReporter
from kdcli.errors import NoSpaceError, WorkerError
from tests.support.small_runs import cache_options

PLAN = [[(k, "identity"), (k + 1, "identity")] for k in (0, 2, 4, 6)]


@pytest.fixture
def source(shapes: Path, teacher: Path) -> Iterator[SampleSource]:
    before = torch.get_num_threads()
    yield plan_store(cache_options(shapes, teacher, method="rm"), NullReporter()).source
    torch.set_num_threads(before)


def at_image(monkeypatch: pytest.MonkeyPatch, source: SampleSource, what: Callable[[], object]) -> Path:
    """Have a worker do ``what`` when it comes to the fourth image, whose path is returned."""
    path, real = source.dataset.image_path(3), samples.read_image

    def read_image(file: Path, size: tuple[int, int], exif: bool) -> Any:
        if file == path:
            what()
        return real(file, size, exif)

    monkeypatch.setattr(samples, "read_image", read_image)
    return path


@pytest.mark.parametrize(
    ("number", "why"), [(signal.SIGKILL, "probably for memory"), (signal.SIGBUS, "/dev/shm is too small.*--shm-size")]
)
def test_a_death_names_the_signal_and_the_image(
    source: SampleSource, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, why: str
) -> None:
    def die() -> None:
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        os.kill(os.getpid(), number)

    path = at_image(monkeypatch, source, die)
    with pytest.raises(WorkerError, match=rf"killed by signal {int(number)} .* while it read {path}: {why}") as told:
        list(Loader(source, 2).samples(PLAN))
    assert told.value.exit_code == 7
    monkeypatch.undo()
    assert len(list(Loader(source, 1).samples(PLAN))) == len(PLAN)  # the next one is not told of it


def test_a_worker_that_ends_is_told(source: SampleSource, monkeypatch: pytest.MonkeyPatch) -> None:
    path = at_image(monkeypatch, source, lambda: os._exit(3))
    with pytest.raises(WorkerError, match=f"exit code 3 while it read {path}; see more with --workers 0"):
        list(Loader(source, 1).batches(PLAN))


def test_a_death_is_told_where_it_is_waited_for(source: SampleSource) -> None:
    """Not in the middle of a training step, which torch would do."""
    made = Loader(source, 1).samples(PLAN * 4)
    next(made)
    found = list(workers._running)[-1]
    found._workers[0].kill()
    found._workers[0].join()  # by now the signal has arrived
    with pytest.raises(WorkerError, match="killed by signal 9"):
        list(made)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_system_keeps_its_kind(
    source: SampleSource, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error", "somewhere.jpg")

    at_image(monkeypatch, source, fail)
    with pytest.raises(OSError, match=r"somewhere\.jpg") as told:
        list(Loader(source, workers).samples(PLAN))
    assert told.value.errno == errno.EIO


def test_a_batch_that_does_not_fit_into_shared_memory(source: SampleSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr("kdcli.engine.loading.loader.PIPE_BYTES", 1000)
    with pytest.raises(NoSpaceError, match=r"/dev/shm has .* left, too little .*--shm-size, or use --workers 0"):
        list(Loader(source, 1).batches(PLAN))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "no memory left"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            "no memory left",
        ),
        (RuntimeError("unable to open shared memory object </torch_1>: Too many open files (24)"), "ulimit -n"),
    ],
)
def test_what_a_worker_lacks(error: Exception, told: str) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(WorkerError, match=told):
        raise attempt(fail) or AssertionError


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    def fail() -> None:
        raise RuntimeError("of the code")

    with pytest.raises(RuntimeError, match="of the code"):
        attempt(fail)


class Things(Dataset[Any]):
    """Gives what ``make`` makes."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return self.make()


def test_what_cannot_be_sent_is_told() -> None:
    """torch prints a traceback from a thread of the worker, and waits for ever."""
    loader = DataLoader(Things(lambda: lambda: None), batch_size=None, num_workers=1, worker_init_fn=begin)
    with pytest.raises(WorkerError, match=r"cannot send a batch .*pickle"):
        list(made_by(loader))


def test_workers_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    loader = DataLoader(Things(int), batch_size=None, num_workers=1, worker_init_fn=begin)
    with pytest.raises(WorkerError, match=r"1 data workers cannot be started .*--workers 0"):
        list(made_by(loader))


@pytest.mark.parametrize(("free", "ahead"), [(None, 4), (1000, 4), (100, 4), (80, 3), (40, 1)])
def test_fewer_batches_are_made_ahead_where_more_would_not_fit(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, free: int | None, ahead: int
) -> None:
    monkeypatch.setattr(workers, "free_shared_memory", lambda: free)
    assert batches_ahead(10, 2) == ahead
    assert len(recwarn) == (ahead < 4)


def test_no_room_for_one_batch_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "free_shared_memory", lambda: 64 * 2**20)
    with pytest.raises(NoSpaceError, match=r"64.0 MB free, 2 data workers need 4 batches of 20.0 MB .*--shm-size"):
        batches_ahead(20 * 2**20, 2)
    assert batches_ahead(0, 2) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(NoSpaceError, match="8 data workers"):
        batches_ahead(8 * 2**20, 2)


def test_workers_end_with_the_process_that_asked() -> None:
    """Killed alone, as for memory; a worker that is in the middle of something looks for its parent nowhere."""
    ours, theirs = os.pipe()

    def note() -> int:
        os.write(theirs, f"{os.getpid()}\n".encode())
        time.sleep(600)
        return 0

    pid = os.fork()
    if pid == 0:
        try:
            list(made_by(DataLoader(Things(note), batch_size=None, num_workers=2, worker_init_fn=begin)))
        finally:
            os._exit(1)
    os.close(theirs)
    pids = []
    with open(ours) as lines:
        pids = [int(lines.readline()) for _ in range(2)]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert lines.read() == ""  # the end of a pipe whose other end they held
    assert len(set(pids)) == 2
