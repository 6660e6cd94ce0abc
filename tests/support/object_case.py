"""What a store in any object store must do: the same checks for Azure's and Google's."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcli.engine.caching.verify import verify_checksums
from kdcli.engine.runtime.progress import NullReporter
from kdcli.errors import StoreError
from kdcli.store.journal import store_digest
from kdcli.store.reader import StoreReader
from kdcli.store.writer import StoreWriter
from tests.support.store_case import assert_row_equal, create, keys, make_row, make_schema, make_store, write

SCHEMA = make_schema()


def assert_that_of_a_folder(url: str, folder: Path) -> None:
    """A store at ``url`` is the one that is made in ``folder``, and both readers give its rows."""
    make_store(url, SCHEMA)
    make_store(folder, SCHEMA)
    assert store_digest(url) == store_digest(folder)
    files, _ = verify_checksums(url, NullReporter())
    assert files == SCHEMA.num_shards * len(SCHEMA.layout())
    for direct in (True, False):
        reader = StoreReader(url, direct=direct)
        for index, key in enumerate(keys()):
            assert_row_equal(reader.read(key), make_row(SCHEMA, index))


def assert_taken_up_again(url: str) -> None:
    """A store at ``url`` that is written in two goes is refused between them, and whole afterwards."""
    create(url, SCHEMA)
    write(url, SCHEMA, [0])
    with pytest.raises(StoreError, match="is incomplete: 1 of"):
        StoreReader(url)
    assert StoreWriter(url, SCHEMA).done() == {0}
    write(url, SCHEMA, list(range(1, SCHEMA.num_shards)))
    assert StoreReader(url).schema.rows == SCHEMA.rows


def read_everything(reader: StoreReader) -> None:
    """Every row is the one that was written."""
    for index, key in enumerate(keys()):
        assert_row_equal(reader.read(key), make_row(SCHEMA, index))
