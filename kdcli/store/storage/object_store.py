"""A store in an object store: ``s3://``, ``gs://``, ``az://``, reached through obstore by a worker process.

Each process that reads or writes has one such worker, started when it is needed: after a fork the child starts its own, as
obstore itself would wait for ever there. A batch of reads is one request to the worker, which does them side by side.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn, cast

from kdcli.errors import KDError, MissingPathError, OptionError, StoreError
from kdcli.store.storage.base import OpenFile
from kdcli.store.storage.read_cache import ReadCache

PATIENCE = "KDCLI_REMOTE_PATIENCE"  # seconds that a request is tried again for
PATIENCE_S = 60.0
MAX_INDICES = 16384  # of shard files, 4 kB each: nothing else of an object is kept
CREDENTIALS = {  # what obstore reads
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
Job = dict[str, Any]


class ObjectStorage:
    """The store at ``url``. Raises OptionError when obstore is not installed."""

    def __init__(self, url: str) -> None:
        if importlib.util.find_spec("obstore") is None:
            raise OptionError(f"'{url}': object stores need obstore; install it with pip install 'kdcli[remote]'")
        self.url = url
        self._cache = ReadCache.from_environment()

    def __str__(self) -> str:
        return self.url

    @property
    def folder(self) -> Path | None:
        """See Storage."""
        return None

    @property
    def max_open(self) -> int:
        """See Storage."""
        return MAX_INDICES

    @property
    def zarr_config(self) -> Mapping[str, str]:
        """See Storage: the faster pipeline reads local files alone."""
        return {}

    def local_folder(self, verb: str) -> Path:
        """See Storage."""
        raise OptionError(
            f"'{self.url}' is in an object store, where nothing can be moved or locked: copy the store to a disk first, "
            f"{verb} there, and copy it back"
        )

    def exists(self) -> bool:
        """See Storage: the root's zarr.json is written last, so it is the store."""
        return self.has("zarr.json")

    def has(self, key: str) -> bool:
        """See Storage."""
        try:
            self.read(key)
        except FileNotFoundError as error:
            if isinstance(error, KDError):  # no such bucket
                raise
            return False
        return True

    def open_all(self, keys: Sequence[str], tail: int) -> list[OpenFile | None]:
        """See Storage."""
        found = self._ask([{"do": "tail", "key": key, "length": tail} for key in keys], missing=True)
        return [
            None if "error" in head else OpenFile(key, int(head["whole"]), data, str(head["version"]))
            for key, (head, data) in zip(keys, found, strict=True)
        ]

    def read_ranges(self, ranges: Sequence[tuple[OpenFile, int, int]]) -> list[bytes]:
        """See Storage. Ranges are chunks that end in their crc32c; the local read cache goes by that."""
        names = [f"{self.url}/{f.key}\n{f.version}\n{start}\n{length}" for f, start, length in ranges]
        found = [self._cache.get(name) if self._cache else None for name in names]
        missing = [k for k, data in enumerate(found) if data is None]
        jobs = [
            {"do": "range", "key": f.key, "start": start, "length": length}
            for f, start, length in (ranges[k] for k in missing)
        ]
        for k, (_, data) in zip(missing, self._ask(jobs), strict=True):
            found[k] = data
            if self._cache:
                self._cache.put(names[k], data)
        return cast(list[bytes], found)

    def read(self, key: str) -> bytes:
        """See Storage."""
        return self.read_all([key])[0]

    def read_all(self, keys: Sequence[str]) -> list[bytes]:
        """See Storage."""
        return [data for _, data in self._ask([{"do": "read", "key": key} for key in keys])]

    def write(self, key: str, data: bytes) -> None:
        """See Storage."""
        self._ask([{"do": "write", "key": key, "create": False}], data)

    def create(self, key: str, data: bytes) -> bool:
        """See Storage. One server decides; a try whose answer was lost is known by its bytes."""
        head, _ = self._ask([{"do": "write", "key": key, "create": True}], data)[0]
        return "error" not in head or self.read(key) == data

    def delete(self, key: str) -> None:
        """See Storage."""
        self._ask([{"do": "delete", "key": key}], missing=True)

    def names(self, folder: str) -> list[str]:
        """See Storage."""
        head, _ = self._ask([{"do": "names", "key": folder}])[0]
        return sorted(name for name in head["names"] if name[:1] != ".")

    def for_zarr(self) -> Any:
        """See Storage. In this process, and therefore not in one that forks."""
        from zarr.storage import ObjectStore

        from kdcli.store.storage.object_store_worker import connect

        return ObjectStore(connect(self.url), read_only=True)

    def create_store(self, fill: Callable[[Path], None]) -> bool:
        """See Storage. The root's zarr.json is put last, and one server decides who puts it."""
        with tempfile.TemporaryDirectory() as folder:
            staging = Path(folder) / "store"
            fill(staging)
            keys = sorted(f.relative_to(staging).as_posix() for f in staging.rglob("*") if f.is_file())
            keys.remove("zarr.json")
            for key in keys:
                if not self.create(key, (staging / key).read_bytes()):
                    raise StoreError(
                        f"'{self.url}/{key}' is of another store, whose making was broken off or goes on now; delete what "
                        "is there, or choose another --out"
                    )
            return self.create("zarr.json", (staging / "zarr.json").read_bytes())

    def free_bytes(self) -> int | None:
        """See Storage."""
        return None

    def lock(self, *, shared: bool) -> AbstractContextManager[None]:
        """See Storage."""
        return nullcontext()

    def lock_creation(self) -> AbstractContextManager[None]:
        """See Storage: each process tries to make it, and one does."""
        return nullcontext()

    def lock_file(self, key: str) -> AbstractContextManager[None]:
        """See Storage: the journal's own put shows who was first."""
        return nullcontext()

    def remove_stale_locks(self, folder: str) -> None:
        """See Storage."""

    def _ask(self, jobs: Sequence[Job], body: bytes = b"", *, missing: bool = False) -> list[tuple[Job, bytes]]:
        """The answers to ``jobs``. ``missing``: an object that is not there is an answer, not FileNotFoundError."""
        answers = _worker().ask(self.url, jobs, body) if jobs else []
        for job, (head, _) in zip(jobs, answers, strict=True):
            error = head.get("error")
            if error is not None and error != "exists" and not (missing and error == "missing"):
                self._fail(error, str(head["text"]), str(job["key"]))
        return answers

    def _fail(self, kind: str, text: str, key: str) -> NoReturn:
        names = CREDENTIALS[self.url.partition(":")[0]]
        if kind == "missing":
            raise FileNotFoundError(f"{self.url}/{key}")
        if kind == "no bucket":
            raise MissingPathError(f"'{self.url}': there is no such bucket; make it, or correct the URL ({text})")
        if kind == "url":
            raise OptionError(f"'{self.url}' cannot be opened ({text}); set e.g. {names} in the environment")
        if kind == "denied":
            raise StoreError(
                f"'{self.url}/{key}': there are no credentials, or the server refuses them; set e.g. {names} in the "
                f"environment ({text})"
            )
        raise StoreError(
            f"'{self.url}/{key}': no answer from the object store; check the network and the endpoint, and run the "
            f"same command again ({text})"
        )


class _Worker:
    """The process of ``object_store_worker.py``, with one request at a time."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("object_store_worker.py")
        self._socket, theirs = socket.socketpair()
        self._replies = self._socket.makefile("rb")
        self._lock = threading.Lock()
        with theirs:
            # -P: the names beside the script are not modules for it
            command = [sys.executable, "-P", str(script), str(_patience()), str(os.getpid())]
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno())

    def ask(self, url: str, jobs: Sequence[Job], body: bytes) -> list[tuple[Job, bytes]]:
        """The answer to each job and the bytes that it read."""
        with self._lock:
            try:
                self._socket.sendall(json.dumps({"url": url, "jobs": jobs, "size": len(body)}).encode() + b"\n")
                self._socket.sendall(body)
                heads: list[Job] = json.loads(self._replies.readline())
                return [(head, self._replies.read(head["size"])) for head in heads]
            except BaseException as error:
                stop_worker()  # what it still has to say is not for the next one who asks
                if isinstance(error, (OSError, ValueError)):
                    raise StoreError(
                        f"'{url}': the process that reads it has ended; run the same command again"
                    ) from error
                raise

    def end(self) -> None:
        """Close its input, which ends it."""
        with suppress(OSError):  # it has ended itself
            self._socket.shutdown(socket.SHUT_RDWR)
        self.abandon()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:  # in the middle of a request
            self._process.kill()
            self._process.wait()

    def abandon(self) -> None:
        """Close our end; in a forked child that is all, for the process is the parent's."""
        self._replies.close()
        self._socket.close()


_running: _Worker | None = None
_parents: list[_Worker] = []  # kept, as a Popen that goes warns of a process that runs on
_starting = threading.Lock()


def _worker() -> _Worker:
    global _running
    with _starting:
        if _running is None:
            _running = _Worker()
        return _running


def stop_worker() -> None:
    """End the process, if there is one; the next read starts another, with the environment of then."""
    global _running
    ending, _running = _running, None
    if ending is not None:
        ending.end()


def _after_fork() -> None:
    global _running, _starting
    _starting = threading.Lock()
    if _running is not None:
        _running.abandon()
        _parents.append(_running)
        _running = None


def _patience() -> float:
    text = os.environ.get(PATIENCE, str(PATIENCE_S))
    try:
        return float(text)
    except ValueError as error:
        raise OptionError(f"{PATIENCE}='{text}' is not a number of seconds") from error


os.register_at_fork(after_in_child=_after_fork)
atexit.register(stop_worker)
