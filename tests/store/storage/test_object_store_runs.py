"""The commands on a store in an object store: writing, a run from it, merging."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcli.cli.main import run
from kdcli.engine.caching.edit import merge
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training import launch
from kdcli.store.reader import StoreReader
from tests.support.small_runs import cache_options, run_request
from tests.support.small_runs import write as write_real
from tests.support.store_case import contents

pytest.importorskip("moto")
pytest.importorskip("obstore")
from tests.support.s3_case import Server, prefix

pytestmark = pytest.mark.usefixtures("s3")


@pytest.mark.full
def test_a_real_store_and_a_run_from_it(
    server: Server, shapes: Path, teacher: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = cache_options(shapes, teacher, method="rm")
    local = write_real(options, tmp_path / "local")
    assert run([
        "cache-teacher", "--data", str(shapes), "--teacher", str(teacher), "--method", "rm", "--workers", "0",
        "--shard-rows", "10", "--micro-batch", "4", "--threads", "1", "--out", url,
    ]) == 0  # fmt: skip
    assert server.objects(prefix(url)) == contents(local)
    capsys.readouterr()
    assert run(["cache", "info", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["complete"]
    assert run(["cache", "verify", url]) == 0
    assert run(["cache", "bench", url, "--rows", "8", "--batch", "4", "--workers", "1"]) == 0

    class Stopped(NullReporter):
        """Ends a run after its first epoch."""

        def stage(self, label: str, total: int) -> None:
            if label == "epoch 2/2":
                raise KeyboardInterrupt

    wanted = run_request("distill", shapes, method="rm", cache=url, workers=1)
    with pytest.raises(KeyboardInterrupt):
        launch.start(wanted, tmp_path / "run", Stopped(), overwrite=False)
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["cache"] == url
    _, stopped = launch.resume(tmp_path / "run", wanted, NullReporter())
    _, straight = launch.start(
        run_request("distill", shapes, method="rm", cache=str(local), workers=0), tmp_path / "local-run", NullReporter(),
        overwrite=False,
    )  # fmt: skip
    assert stopped["weights_sha256"] == straight["weights_sha256"]


def test_merging_stores_of_both_kinds(server: Server, shapes: Path, teacher: Path, url: str, tmp_path: Path) -> None:
    parts: list[Any] = []
    for view, where in (("identity", tmp_path / "identity"), ("hflip", f"{url}/hflip")):
        parts.append(where)
        write_real(cache_options(shapes, teacher, method="rm", views=view), where)
    merge(parts, f"{url}/both", None, NullReporter())
    merge([parts[0], f"{url}/hflip"], tmp_path / "both", None, NullReporter())
    assert server.objects(f"{prefix(url)}/both") == contents(tmp_path / "both")
    np.testing.assert_array_equal(StoreReader(f"{url}/both").image_ids, StoreReader(tmp_path / "both").image_ids)
