"""Every byte of a small store, changed alone: ``cache verify`` has to refuse each."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from kdcli.engine.caching.verify import verify_checksums
from kdcli.engine.runtime.progress import NullReporter
from kdcli.errors import KDError
from tests.attack.case import Scratch
from tests.support.attack import child
from tests.support.attack.judge import signature
from tests.support.attack.world import HERE, World

BATCH = 200  # bytes a child


def make_store(world: World, scratch: Scratch) -> Path:
    """A store of one image in two views, of LD alone."""
    scratch.clear()
    log = scratch.root / "log"
    shapes, store = scratch.into / "shapes", scratch.into / "store"
    argv = [
        "cache-teacher",
        "--data",
        str(shapes),
        "--teacher",
        str(world.teacher_pt),
        "--method",
        "ld",
        "--out",
        str(store),
        *HERE,
    ]
    for line in (["data", "make-shapes", str(shapes), "--train", "1", "--val", "1"], argv):
        found = child.run(line, log)
        assert found.code == 0, found.err
    return store


def places(store: Path) -> list[tuple[Path, int]]:
    """Every byte of every file, in an order such that the first thousand are of all files."""
    found = [(f, k) for f in sorted(store.rglob("*")) if f.is_file() for k in range(f.stat().st_size)]
    Random(0).shuffle(found)
    return found


def attempts(store: Path, seed: int, numbers: list[int], log: Path) -> Iterator[dict[str, Any]]:
    """A result for each of ``numbers`` among ``places``, tried in children that restore the byte before the next."""
    everything = places(store)
    right = {file: file.read_bytes() for file in {f for f, _ in everything}}
    while numbers:
        batch = numbers[:BATCH]

        def work(batch: list[int] = batch) -> int:
            for number in batch:
                file, at = everything[number]
                print(json.dumps(_attempt(store, file, right[file], at, seed, number)), flush=True)
            return 0

        out, err = log / "stdout", log / "stderr"
        outcome = child.wait(child.fork(work, out, err, seconds=600), out, err, time.monotonic())
        lines = [json.loads(line) for line in outcome.out.splitlines() if line.endswith("}")]
        yield from lines
        if len(lines) < len(batch):
            file, at = everything[batch[len(lines)]]
            yield _line(
                store, file, at, seed, batch[len(lines)], outcome.code, f"crash: {outcome.code}", outcome.err[-500:]
            )
        for file, data in right.items():
            if file.read_bytes() != data:
                file.write_bytes(data)
        numbers = numbers[max(1, len(lines) + (len(lines) < len(batch))) :]


def _attempt(store: Path, file: Path, data: bytes, at: int, seed: int, number: int) -> dict[str, Any]:
    changed = bytearray(data)
    changed[at] ^= Random(f"{seed}/{number}").randint(1, 255)
    file.write_bytes(changed)
    code, problem, tail = 0, "accepted", ""
    try:
        verify_checksums(store, NullReporter())
    except KDError as error:
        code, problem = error.exit_code, "" if "\n" not in str(error) and len(str(error)) < 400 else "long error"
    except OSError as error:
        code, problem = 3, "" if error.filename else "an error of the system without a name"
    except BaseException:
        code, problem, tail = 1, "traceback", traceback.format_exc()
    finally:
        file.write_bytes(data)
    return _line(store, file, at, seed, number, code, problem, tail)


def _line(
    store: Path, file: Path, at: int, seed: int, number: int, code: int, problem: str, tail: str
) -> dict[str, Any]:
    outcome = child.Outcome(code, "", tail, 0.0, 0)
    argv = ["cache", "verify", str(store)]
    finding = {
        "problem": problem,
        "step": "verify",
        "argv": argv,
        "tail": tail[-1500:],
        "signature": signature(outcome, problem),
    }
    return {
        "kind": "every-byte", "seed": seed, "number": number, "damage": f"byte {at} of {file.relative_to(store)}",
        "steps": [{"step": "verify", "code": code, "seconds": 0.0, "findings": [finding] if problem else []}],
    }  # fmt: skip
