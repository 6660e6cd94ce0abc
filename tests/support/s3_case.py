"""An S3 server on loopback, moto's, as a process of its own; and a network before it that can break."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import pytest

from kdcli.store.storage.object_store import stop_worker

BUCKET = "stores"
HOST = "127.0.0.1"


class Server:
    """The server. It keeps its objects in memory, so what breaks is the ``Proxy`` before it."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port = int(probe.getsockname()[1])
        command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection((HOST, self.port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "moto's server does not start"
                assert self._process.poll() is None, "moto's server ended"
                time.sleep(0.05)
        self.client.create_bucket(Bucket=BUCKET)

    @property
    def client(self) -> Any:
        """Another client than the one under test."""
        import boto3

        return boto3.client(
            "s3", endpoint_url=f"http://{HOST}:{self.port}", region_name="us-east-1", aws_access_key_id="a",
            aws_secret_access_key="b",
        )  # fmt: skip

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Every object below ``prefix``, by its key there."""
        client = self.client
        listed = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        names = [o["Key"] for page in listed for o in page.get("Contents", [])]
        return {n[len(prefix) + 1 :]: client.get_object(Bucket=BUCKET, Key=n)["Body"].read() for n in names}

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class Proxy:
    """Passes TCP connections on to a port, until it is cut; and again after ``mend``, at the same port."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self.port = 0
        self.mend()

    def mend(self) -> None:
        """Listen."""
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        while True:
            try:
                self._listener.bind((HOST, self.port))
                break
            except OSError:  # the thread that accepted has not let go of the port yet
                time.sleep(0.01)
        self.port = int(self._listener.getsockname()[1])
        self._listener.listen(64)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Close the port, and every connection in the middle of whatever it carries."""
        with self._lock:
            for end in (self._listener, *self._open):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # closed by cut()
            while True:
                ours, _ = listener.accept()
                theirs = socket.create_connection((HOST, self._target))
                with self._lock:
                    self._open += [ours, theirs]
                for source, sink in ((ours, theirs), (theirs, ours)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def use(patch: pytest.MonkeyPatch, port: int, *, patience: float = 20, credentials: bool = True) -> None:
    """Point the environment at a server on ``port``."""
    stop_worker()  # it has the environment that it was started in
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("AWS_ENDPOINT_URL", f"http://{HOST}:{port}")
    patch.setenv("AWS_REGION", "us-east-1")
    patch.setenv("AWS_METADATA_ENDPOINT", f"http://{HOST}:1")
    patch.setenv("KDCLI_REMOTE_PATIENCE", str(patience))
    if credentials:
        patch.setenv("AWS_ACCESS_KEY_ID", "a")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "b")


def prefix(url: str) -> str:
    """The key below which the store at ``url`` lies."""
    return url.removeprefix(f"s3://{BUCKET}/")
