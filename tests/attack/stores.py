"""Damaged stores, fed to every command that reads or changes one."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

from kdcli.store.checksummed_json import add_checksum
from tests.attack.case import CANARY, Case, Scratch, Step, files, printed, run_result
from tests.support.attack.mutate_bytes import damage, replace_by_no_file
from tests.support.attack.mutate_values import damage_json, draw_path, show, with_value
from tests.support.attack.world import HERE, World

ROWS = 4  # of a shard
# what a resealed manifest or journal entry holds instead of a value
SEALED: tuple[Any, ...] = (
    None, True, "", "x", [], {}, 0, -1, 1.5, 10**30, 2**63, -(2**63), [1], {"a": 1}, "\x1b]0;owned\x07", "A" * 100_000,
    ["x"] * 1000, "../../../../etc/passwd", 1e308,
)  # fmt: skip


def make(world: World, rng: Random, number: int, scratch: Scratch, damaged: bool) -> Case:
    """A store that was changed, and what reads it; the slow commands take turns."""
    subject = ("store", "store_ld", "store", "store_identity", "store")[number % 5]
    store = Path(shutil.copytree(world.root / subject, scratch.into / "store"))
    what, sealed = _damage(world, rng, store, scratch) if damaged else ("undamaged", False)
    return Case(f"{subject}: {what}" if what else "", _steps(world, scratch, store, subject, number // 5, what, sealed))


def _steps(world: World, scratch: Scratch, store: Path, subject: str, turn: int, what: str, sealed: bool) -> list[Step]:
    """What reads the store. Somebody who makes right checksums makes another store, which is only to be handled well."""
    same, refuse = ("any", "any") if sealed else ("same", "refuse")
    verify = ["cache", "verify", str(store)]
    copied = ["cache", "verify", str(scratch.out / "store")]
    # a reader checks that a row is of its image and view; only verify reads whole files, and sees that parts changed places
    moved = what.startswith(("rows ", "shard files ", "file ")) and "row/identity" not in what
    found = verify if moved and not sealed else None
    steps = [
        Step("verify", verify, refuse),
        Step(f"info {subject}", ["cache", "info", str(store), "--json"], same, printed, verify),
    ]

    def in_place(name: str, argv: list[str]) -> Step:
        settle = None if sealed else verify
        return Step(name, argv, same, files(lambda s: s.into / "store"), settle, in_place=True)

    if subject == "store_ld":
        add = ["cache", "add", str(store), "--method", "pfi" if turn % 2 else "rm"]
        again = ["cache", "verify", str(store), "--teacher", str(world.teacher_pt), "--rows", "12"]
        return [*steps, Step("verify --teacher", again, refuse), in_place(f"add {add[-1]}", add)]
    made = files(lambda s: s.out / "store")
    if subject == "store_identity":
        merge = ["cache", "merge", str(store), str(world.store_hflip), "--out", str(scratch.out / "store")]
        return [*steps, Step("merge", merge, same, made, None if sealed else copied)]
    show = ["cache", "show", str(store), "1", "--out", str(scratch.out / "row.png")]
    steps.append(Step("show", show, same, files(lambda s: s.out), found))
    slow = [
        Step("distill", world.distill(scratch.out / "run", store=store), same, run_result(lambda s: s.out / "run"), found),
        in_place("prune --tensor", ["cache", "prune", str(store), "--tensor", "features@all"]),
        Step(
            "prune --view", ["cache", "prune", str(store), "--view", "hflip", "--out", str(scratch.out / "store")],
            same, made,
            None if sealed else copied,
        ),
        Step("bench", ["cache", "bench", str(store), "--workers", "0", "--rows", "12", "--batch", "4"]),
        Step("cache-teacher", world.cache_teacher(store), in_place=True),
        Step("distill", world.distill(scratch.out / "run", store=store), same, run_result(lambda s: s.out / "run"), found),
        Step("eval of a store", ["eval", str(store), "--data", str(world.shapes), *HERE[:2]], "refuse"),
    ]  # fmt: skip
    return [*steps, slow[turn % len(slow)]]


def _damage(world: World, rng: Random, store: Path, scratch: Scratch) -> tuple[str, bool]:
    """Change the store; what was done, and whether by someone who can make checksums."""
    paths = sorted(p for p in store.rglob("*") if p.is_file())
    shards = [p for p in paths if "/c/" in str(p) and "image_id" not in str(p)]
    kind = rng.choice(["bytes", "bytes", "shard bytes", "json", "sealed", "sealed", "shards", "rows", "foreign",
        "kind", "extra",
                       "code"])  # fmt: skip
    if kind == "bytes":
        return damage(rng, rng.choice(paths)), False
    if kind == "shard bytes":
        return damage(rng, rng.choice(shards)), False
    if kind == "kind":
        return replace_by_no_file(rng, rng.choice([*paths, store / "journal", rng.choice(shards).parent])), False
    if kind in ("json", "sealed", "code"):
        return _values(rng, store, scratch, kind), kind != "json"
    if kind == "extra":
        return _extra(rng, store), True  # what a store does not name is nobody's business
    if kind == "foreign":
        return _foreign(world, rng, store), False
    first = rng.choice(shards)
    return (_swap_rows(rng, first) if kind == "rows" else _swap_shards(rng, first, shards)), False


def _values(rng: Random, store: Path, scratch: Scratch, kind: str) -> str:
    """Other values in the manifest, a journal file or an array's header; with a right checksum unless ``json``."""
    headers = [p for p in sorted(store.rglob("zarr.json")) if p.parent != store]
    own = [store / "zarr.json", *sorted((store / "journal").iterdir())]
    path = rng.choice([*own, store / "zarr.json", *([rng.choice(headers)] if kind == "json" else [])])
    document = json.loads(path.read_text())
    name = path.relative_to(store)
    if kind == "json":
        text, what, at = damage_json(rng, document)
        path.write_text(text, errors="surrogatepass")
        same = _parsed(text) == document
        return "" if same and what != "twice" else f"{what} at {show(at)} of {name}"
    manifest = path == store / "zarr.json"
    plain = document["attributes"]["kdcli"] if manifest else document
    plain.pop("sha256", None)
    if kind == "code":
        evil = scratch.into / "evil.py"
        evil.write_text(f"open({str(scratch.root / CANARY)!r}, 'w')\n")
        plain = json.loads((store / "zarr.json").read_text())["attributes"]["kdcli"]
        plain.pop("sha256", None)
        plain["methods"] = f"{plain['methods'].split(',')[0]},{evil}:Evil"
        plain["method_options"] = {**plain["method_options"], "evil": {}}
        path, manifest, what, name = store / "zarr.json", True, "a method that is a file", Path("zarr.json")
    else:
        at = draw_path(rng, plain)
        value = rng.choice(SEALED)
        plain = with_value(plain, at, value)
        what = f"{str(value)[:20]!r} at {show(at)}, resealed,"
    sealed: Any = add_checksum(plain) if isinstance(plain, dict) else plain
    whole = {"attributes": {"kdcli": sealed}, "zarr_format": 3, "node_type": "group"} if manifest else sealed
    path.write_text(json.dumps(whole) if manifest else json.dumps(whole, sort_keys=True))
    return f"{what} of {name}"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _swap_rows(rng: Random, path: Path) -> str:
    """Two rows of a shard change places: their bytes, or with equal checksums of each nothing but their order."""
    data = bytearray(path.read_bytes())
    index = len(data) - (16 * ROWS + 4)
    chunks = [bytes(data[o : o + n]) for o, n in struct.iter_unpack("<QQ", data[index:-4])]
    a, b = rng.sample(range(ROWS), 2)
    chunks[a], chunks[b] = chunks[b], chunks[a]
    places, offset = b"", 0
    for chunk in chunks:
        places += struct.pack("<QQ", offset, len(chunk))
        offset += len(chunk)
    from kdcli.store.checksums import crc_bytes

    after = b"".join(chunks) + places + crc_bytes(places)
    path.write_bytes(after)
    return "" if after == bytes(data) else f"rows {a} and {b} swapped in a shard of {_array(path)}"


def _swap_shards(rng: Random, first: Path, shards: list[Path]) -> str:
    """Two shard files of one array change places, or of two arrays."""
    array = _array(first)
    alike = [p for p in shards if p != first and (rng.random() < 0.3 or _array(p) == array)]
    second = rng.choice(alike or shards)
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    return "" if one == other else f"shard files swapped: {array} {first.name} and {_array(second)}"


def _array(shard: Path) -> str:
    """The array of a shard file."""
    return str(shard).rpartition("/in/store/")[2].partition("/c/")[0]


def _foreign(world: World, rng: Random, store: Path) -> str:
    """Parts of the store of another teacher."""
    other = world.store_b
    if not (store / "tensors" / "features@all").exists() or rng.choice(["all", "x", "x"]) == "all":
        name = "zarr.json"
        shutil.copy(other / name, store / name)
        return "the manifest of another store"
    shard = rng.randrange(3)
    kind = rng.choice(["shard", "shard and journal", "journal", "file"])
    parts = [
        p for p in sorted(other.rglob("*")) if p.is_file() and f"/c/{shard}" in str(p) and "image_id" not in str(p)
    ]
    if kind == "file":
        parts = [rng.choice([p for p in parts if "/tensors/" in str(p)])]
    changed = False
    for part in parts if kind != "journal" else []:
        target = store / part.relative_to(other)
        if target.is_file():
            changed = changed or target.read_bytes() != part.read_bytes()
            shutil.copy(part, target)
    if "journal" in kind:
        shutil.copy(other / "journal" / f"{shard:06d}.json", store / "journal" / f"{shard:06d}.json")
        changed = True
    return f"{kind} {shard} of another teacher's store" if changed else ""


def _extra(rng: Random, store: Path) -> str:
    """Something more in the folder."""
    name = rng.choice([".adding", "journal/999999.json", "journal/x.json", ".store.lock", "tensors/x@all",
        "README.txt", "journal/.tmp",
                       "c", "journal/000000.json.tmp"])  # fmt: skip
    path = store / name
    kind = rng.choice(["folder", "file", "pipe", "device"])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return ""
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_bytes(rng.choice([b"", b"{}", rng.randbytes(100)]))
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    return f"{kind} {name} more"
