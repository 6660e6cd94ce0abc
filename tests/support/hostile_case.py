"""Attempts to read a store that was changed by someone who knows how to seal it, in a child with little memory."""

from __future__ import annotations

import copy
import json
import os
import resource
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdcli.engine.caching.verify import verify_checksums
from kdcli.engine.runtime.progress import NullReporter
from kdcli.errors import KDError, StoreError
from kdcli.store.checksummed_json import add_checksum, digest
from kdcli.store.encoding_error import Measured
from kdcli.store.manifest import read_manifest, write_manifest
from kdcli.store.reader import StoreReader
from tests.support.store_case import keys, make_schema, make_store

SCHEMA = make_schema()
MEGABYTE = 2**20
ROOM = 200 * MEGABYTE  # of address space, for all that a child may want beside what it was born with
GROWTH = 50 * MEGABYTE  # of resident memory, for one attempt


@dataclass(frozen=True)
class Result:
    """What became of one attempt to read."""

    name: str
    reading: str  # "same", "other", or the kind of error
    verifying: str  # likewise; "" when reading failed
    text: str  # of the first error
    code: int  # its exit code
    grown: int  # bytes of peak resident memory


@dataclass(frozen=True)
class Change:
    """A file of a store and what it holds instead."""

    name: str
    file: str
    data: bytes


def make(path: Path) -> Path:
    """A complete store, whose headers are those of the zarr-python that is here, with errors in its manifest."""
    make_store(path, SCHEMA)
    errors = Measured(encoding={"rank@main": {"rms": 1e-05, "relative": 0.25, "worst": 0.5}})
    write_manifest(path, replace(read_manifest(path), errors=errors))
    return path


def reading(store: Path) -> dict[str, str]:
    """A sha256 of the values of each array in every row."""
    reader = StoreReader(store)
    found: dict[str, list[str]] = {}
    for key in keys():
        row = reader.read(key)
        assert row.entries is not None
        entries = {name: getattr(row.entries, name).numpy() for name in ("index", "flag", "gt", "weight")}
        for name, value in {**row.arrays, **entries, "geometry": row.geometry}.items():
            found.setdefault(name, []).append(value.tobytes().hex())
        found.setdefault("identity", []).append((row.content + row.guard).hex())
    return {name: digest(values) for name, values in found.items()}


def kilobytes(field: str) -> int:
    """A line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def attempt(store: Path, change: Change, right: dict[str, str]) -> Result:
    """Read every row and verify the changed store; the file is as it was afterwards."""
    file = store / change.file
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(change.data)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    resident = kilobytes("VmRSS")
    steps: list[Callable[[], str]] = [
        lambda: "same" if reading(store).items() <= right.items() else "other",  # a tensor less is a store too
        lambda: "same" if verify_checksums(store, NullReporter())[0] else "other",
    ]
    found, text, code = ["", ""], "", 0
    try:
        for k, step in enumerate(steps):
            found[k] = step()
    except BaseException as error:  # whatever it is, the parent judges
        found[k] = "StoreError" if isinstance(error, StoreError) else repr(error)[:200]
        text, code = str(error), error.exit_code if isinstance(error, KDError) else 1
    grown = (kilobytes("VmHWM") - resident) * 1024
    if before is None:
        file.unlink()
    else:
        file.write_bytes(before)
    return Result(change.name, found[0], found[1], text, code, grown)


def attempts(store: Path, changes: Iterable[Change]) -> list[Result]:
    """Try each change in a child that may not take much more memory than it is born with."""
    right = reading(store)
    listed = list(changes)
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ours)
            most = kilobytes("VmSize") * 1024 + ROOM
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            with os.fdopen(theirs, "w") as pipe:
                for change in listed:
                    pipe.write(json.dumps(vars(attempt(store, change, right))) + "\n")
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        results = [Result(**json.loads(line)) for line in pipe]
    os.waitpid(pid, 0)
    assert len(results) == len(listed), f"it died of {listed[len(results)].name}"
    assert reading(store) == right
    return results


def require_refused(results: Iterable[Result], *, when_read: bool = True) -> None:
    """Each was a StoreError of one line: of the reader, or (not ``when_read``) of verify at the latest."""
    for result in results:
        require_harmless(result)
        last = result.verifying or result.reading
        assert last == "StoreError", result
        assert not when_read or result.reading == "StoreError", result


def require_harmless(result: Result) -> None:
    """The right rows or a StoreError of one line, and no memory to speak of."""
    assert result.reading in ("same", "StoreError"), result
    assert result.verifying in ("", "same", "StoreError"), result
    if result.text:
        assert result.code == 4, result
        assert "\n" not in result.text, result
        assert len(result.text) < 1000, result
    assert result.grown < GROWTH, result


def set_at(document: Any, path: str, value: Any) -> Any:
    """A copy of ``document`` with ``value`` at ``a.0.b``."""
    changed = copy.deepcopy(document)
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    storage = changed
    for name in parents:
        storage = storage[name]
    storage[last] = value
    return changed


def entry_file(entry: Any) -> bytes:
    """A journal file of any entry, with a right checksum."""
    return json.dumps(add_checksum(entry), sort_keys=True).encode()


def manifest_file(manifest: Any) -> bytes:
    """A root zarr.json of any manifest, with a right checksum."""
    document = {"attributes": {"kdcli": add_checksum(manifest)}, "zarr_format": 3, "node_type": "group"}
    return json.dumps(document).encode()  # C code, which can nest deeper
