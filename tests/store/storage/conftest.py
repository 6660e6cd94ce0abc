"""An S3 server on loopback, what stands before it, and a store in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from kdcli.store.storage import object_store as remote_module
from tests.support.s3_case import BUCKET, Proxy, Server, use
from tests.support.store_case import make_schema, make_store

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """moto's, one for all that need S3."""
    started = Server()
    yield started
    started.stop()


@pytest.fixture
def s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment points at it."""
    use(monkeypatch, server.port)
    yield
    remote_module.stop_worker()


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Stands between the store and the server."""
    between = Proxy(server.port)
    use(monkeypatch, between.port)
    yield between
    between.cut()


@pytest.fixture
def url() -> str:
    """Where nothing is yet."""
    return f"s3://{BUCKET}/test/{next(NUMBERS)}"


@pytest.fixture(scope="session")
def whole(server: Server) -> str:
    """A complete store; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        use(patch, server.port)
        make_store(f"s3://{BUCKET}/whole", make_schema())
    return f"s3://{BUCKET}/whole"
