"""Stores in Azure's object store: it knows no ranges from the end of an object, and Azurite speaks as it does.

The tests with Azurite run where ``azurite-blob`` is on the PATH (``npm install -g azurite``).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from kdcli.store.storage import object_store as remote_module
from tests.support.object_case import assert_taken_up_again, assert_that_of_a_folder

obstore = pytest.importorskip("obstore")

HOST, ACCOUNT, CONTAINER = "127.0.0.1", "devstoreaccount1", "stores"
# Azurite's own, which its documentation gives: no secret
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.mark.parametrize("length", [1, 4, 10, 50])
def test_the_end_of_an_object_without_ranges_from_the_end(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from obstore.exceptions import NotSupportedError
    from obstore.store import MemoryStore

    from kdcli.store.storage.object_store_worker import execute

    store, job = MemoryStore(), {"do": "tail", "key": "a", "length": length}
    obstore.put(store, "a", b"0123456789")
    usual, real = execute(store, job, b""), obstore.get

    def get(store: Any, key: str, *, options: Any) -> Any:
        if "suffix" in options["range"]:
            raise NotSupportedError("Azure does not support suffix range requests")
        return real(store, key, options=options)

    monkeypatch.setattr(obstore, "get", get)
    assert execute(store, job, b"") == usual
    assert usual[1] == b"0123456789"[-length:]
    assert usual[0]["whole"] == 10


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Azurite with one container."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite-blob is not on the PATH")
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    command = [
        program, "--silent", "--skipApiVersionCheck", "--blobHost", HOST, "--blobPort", str(port),
        "--location", str(tmp_path_factory.mktemp("azurite")),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        make_container(f"http://{HOST}:{port}/{ACCOUNT}")
        yield f"http://{HOST}:{port}/{ACCOUNT}"
    finally:
        process.terminate()
        process.wait()


def make_container(endpoint: str) -> None:
    """One signed request, as soon as the server answers."""
    date, version = formatdate(usegmt=True), "2021-08-06"
    resource = f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
    text = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n{resource}"
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)).decode()
    headers = {"x-ms-date": date, "x-ms-version": version, "Authorization": f"SharedKey {ACCOUNT}:{signature}"}
    request = urllib.request.Request(f"{endpoint}/{CONTAINER}?restype=container", method="PUT", headers=headers)
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except OSError as error:  # of which URLError is one
            if isinstance(error, urllib.error.HTTPError) or time.monotonic() > deadline:
                raise
        time.sleep(0.1)


@pytest.fixture
def _azure(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    remote_module.stop_worker()
    yield
    remote_module.stop_worker()


@pytest.mark.slow
@pytest.mark.usefixtures("_azure")
def test_a_store_in_azurite_is_that_of_a_folder(tmp_path: Path) -> None:
    assert_that_of_a_folder(f"az://{CONTAINER}/whole", tmp_path / "s")


@pytest.mark.slow
@pytest.mark.usefixtures("_azure")
def test_a_store_in_azurite_is_taken_up_again() -> None:
    assert_taken_up_again(f"az://{CONTAINER}/parts")
