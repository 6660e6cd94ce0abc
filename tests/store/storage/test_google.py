"""Stores in Google's object store, whose XML interface is S3's but for two headers: ``Translator`` renames them for moto.

What is tested is Google's client and our use of it, not Google's server.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kdcli.errors import MissingPathError
from kdcli.store.reader import StoreReader
from kdcli.store.storage import object_store as remote_module
from kdcli.store.storage.resolve import open_storage
from tests.support.object_case import assert_taken_up_again, assert_that_of_a_folder

pytest.importorskip("moto")
pytest.importorskip("obstore")
from tests.support.s3_case import BUCKET, HOST, Server

pytestmark = pytest.mark.full  # make test has S3, and one store in Azure

# moto looks at no signature, but refuses what has none
AMAZONS = "AWS4-HMAC-SHA256 Credential=a/20261121/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class Translator(BaseHTTPRequestHandler):
    """Hands a request on to moto as S3 spells it. ``target`` is moto's port."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are sent apart: 40 ms for each answer
    target = 0

    def _hand_on(self) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "authorization")}
        headers["Authorization"] = AMAZONS
        if headers.pop("x-goog-if-generation-match", None) == "0":  # put it only where nothing is
            headers["If-None-Match"] = "*"
        server = http.client.HTTPConnection(HOST, self.target)
        server.request(self.command, self.path, self.rfile.read(int(headers.get("content-length", 0))), headers)
        answer = server.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "content-length", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        self.send_header(
            "Content-Length", answer.headers["Content-Length"] if self.command == "HEAD" else str(len(body))
        )
        self.end_headers()
        self.wfile.write(body)
        server.close()

    do_GET = do_PUT = do_DELETE = do_HEAD = _hand_on

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: stderr is looked at."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a translator before a server of its own."""
    server = Server()
    translator = ThreadingHTTPServer((HOST, 0), type("Translator", (Translator,), {"target": server.port}))
    threading.Thread(target=translator.serve_forever, daemon=True).start()
    yield translator.server_address[1]
    translator.shutdown()
    translator.server_close()
    server.stop()


@pytest.fixture(autouse=True)
def _google(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GOOGLE_BASE_URL", f"http://{HOST}:{port}")
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "t")
    monkeypatch.setenv("KDCLI_REMOTE_PATIENCE", "5")
    remote_module.stop_worker()
    yield
    remote_module.stop_worker()


def test_a_store_is_that_of_a_folder(tmp_path: Path) -> None:
    assert_that_of_a_folder(f"gs://{BUCKET}/whole", tmp_path / "s")


def test_a_store_is_taken_up_again() -> None:
    assert_taken_up_again(f"gs://{BUCKET}/parts")


def test_the_first_to_create_an_object_has_made_it() -> None:
    storage = open_storage(f"gs://{BUCKET}/first")
    assert storage.create("a", b"ours")
    assert storage.create("a", b"ours")  # the answer to our first try was lost
    assert not storage.create("a", b"theirs")
    assert storage.read("a") == b"ours"
    storage.delete("a")
    assert not storage.has("a")


def test_a_bucket_that_is_not_there() -> None:
    with pytest.raises(MissingPathError, match="nothing-here"):
        StoreReader("gs://nothing-here/store")
