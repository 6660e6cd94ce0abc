"""How long requests to an object store are tried again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("obstore")
from obstore import exceptions

from kdcli.store.storage import object_store_worker


@pytest.mark.parametrize(("patience", "tries"), [(0.0, 3), (0.5, 3), (20.0, 9)])
def test_it_tries_for_as_long_as_patience_lasts(patience: float, tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that its own waits alone move."""
    waits: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(waits), sleep=waits.append)
    monkeypatch.setattr(object_store_worker, "time", clock)
    monkeypatch.setattr(object_store_worker, "random", SimpleNamespace(uniform=lambda low, high: high))
    run_request = []

    def work() -> None:
        run_request.append(len(waits))
        raise exceptions.GenericError("error sending request")

    with pytest.raises(exceptions.GenericError):
        object_store_worker.attempt(work, patience)
    assert run_request == list(range(tries))
    assert sum(waits) <= max(patience, 0.31)  # three tries at least
    assert waits == sorted(waits)
