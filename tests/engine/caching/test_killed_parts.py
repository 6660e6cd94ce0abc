"""Parts of a store, forked from one warmed parent or run by torchrun: killed, and finished by another number of them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.engine.caching import write as write_module
from kdcli.engine.caching.plan import StorePlan, plan_store
from kdcli.engine.caching.write import Part, write_store
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.teacher.forward import single
from kdcli.store.manifest import read_manifest
from kdcli.store.schema import StoreSchema
from kdcli.structures import Entries, Targets
from kdcli.tensors import Need
from tests.support.files import contents
from tests.support.small_runs import cache_options


@dataclass(frozen=True)
class StubTeacher:
    """Numbers that follow from the pixels, after a short rest: what is tried is the write_module."""

    schema: StoreSchema
    micro_batch: int = 4
    precision: str = "fp32"

    def rows(
        self, images: torch.Tensor, targets: Targets, entries: Entries | None, needs: Iterable[Need], proposals: None
    ) -> list[dict[str, torch.Tensor]]:
        """See TeacherForward."""
        assert entries is not None
        time.sleep(0.01 * len(images))  # for kills to fall into: a part of three takes 160 ms at least
        found = []
        for k, image in enumerate(images):
            noise = torch.Generator().manual_seed(int(image.long().sum()))
            row = {}
            for tensor in self.schema.restrict(needs):
                sparse = not tensor.need.dense
                count = (
                    int(single(entries, k).select(tensor.need.region).sum()) if sparse else self.schema.count(tensor)
                )
                value = torch.randn(count, *tensor.dims, generator=noise)
                row[tensor.need.key] = value if sparse else value[None]
            found.append(row)
        return found


@pytest.fixture
def stub_plan(shapes: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> StorePlan:
    """A store of 16 shards with that teacher."""
    monkeypatch.setattr(write_module, "measure_teacher", lambda plan, reporter: 50.0)
    plan = plan_store(cache_options(shapes, teacher, shard_rows=3), NullReporter())
    stub: Any = StubTeacher(plan.schema)
    return replace(plan, teacher=replace(plan.teacher, forward=stub))


def journalled(store: Path) -> int:
    """How many shards are finished."""
    return len(list((store / "journal").glob("0*.json")))


def write_parts(plan: StorePlan, store: Path, count: int, draw: random.Random, *, kill: bool) -> int:
    """Fork ``count`` processes for a part each; returns how many died.

    ``kill``: the first and some of the others, each once a random number of shards is there.
    """
    pids = []
    for index in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                write_store(plan, store, NullReporter(), Part(index, count))
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    killed, have = 0, journalled(store)
    for pid in pids:
        if kill and (pid == pids[0] or draw.random() < 0.7):
            least, until = draw.randint(have, have + 4), time.monotonic() + 20
            while journalled(store) < min(least, plan.schema.num_shards) and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.01))
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in ((0, -signal.SIGKILL) if kill else (0,))
        killed += code != 0
    return killed


def rounds_of_parts(plan: StorePlan, folder: Path, counts: Sequence[int], seed: int) -> int:
    """Each of ``counts``: so many parts, killed at random, then another number of them, killed, then a third to the end."""
    write_store(plan, folder / "whole", NullReporter())
    whole, draw, killed = contents(folder / "whole"), random.Random(seed), 0
    assert read_manifest(folder / "whole").errors is not None
    for step, count in enumerate(counts):
        store = folder / f"s{step}"
        others = draw.sample([n for n in range(1, 6) if n != count], 2)
        killed += write_parts(plan, store, count, draw, kill=True)
        killed += write_parts(plan, store, others[0], draw, kill=True)
        write_parts(plan, store, others[1], draw, kill=False)
        assert contents(store) == whole  # every row, the errors in the manifest, and no lock or temporary file
        assert sorted(p.name for p in folder.iterdir()) == [f"s{step}", "whole"]
        shutil.rmtree(store)
    return killed


def test_killed_parts_lose_nothing(stub_plan: StorePlan, tmp_path: Path) -> None:
    assert rounds_of_parts(stub_plan, tmp_path, (3,), seed=1) > 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 5])
def test_twenty_rounds_of_killed_parts(stub_plan: StorePlan, tmp_path: Path, count: int) -> None:
    assert rounds_of_parts(stub_plan, tmp_path, [count] * 20, seed=count) > 20


def torchrun(processes: int, shapes: Path, teacher: Path, out: Path) -> subprocess.Popen[bytes]:
    """``kdcli cache-teacher`` in so many processes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "kdcli",
        "cache-teacher", "--data", str(shapes), "--teacher", str(teacher), "--method", "ld,rm,pfi", "--workers", "0",
        "--shard-rows", "3", "--micro-batch", "4", "--threads", "1", "--out", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def children(pid: int) -> list[int]:
    """The processes that ``pid`` has started: torchrun gives each rank a session of its own."""
    return [int(word) for file in Path(f"/proc/{pid}/task").glob("*/children") for word in file.read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "victims"), [(3, 2, "all"), (2, 3, "one rank")])
def test_a_killed_torchrun_is_finished_by_another_number(
    shapes: Path, teacher: Path, tmp_path: Path, first: int, second: int, victims: str
) -> None:
    write_store(
        plan_store(cache_options(shapes, teacher, shard_rows=3), NullReporter()), tmp_path / "whole", NullReporter()
    )
    out = tmp_path / "store"
    process = torchrun(first, shapes, teacher, out)
    deadline = time.monotonic() + 500
    while journalled(out) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.002)
    ranks = children(process.pid)
    assert len(ranks) == first
    for pid in [process.pid, *ranks] if victims == "all" else ranks[:1]:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=300)  # when a rank dies, torchrun stops the others
    assert process.returncode != 0
    assert 2 <= journalled(out) < 16
    process = torchrun(second, shapes, teacher, out)
    assert process.communicate(timeout=500)[1] is not None
    assert process.returncode == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert read_manifest(out).errors is not None
