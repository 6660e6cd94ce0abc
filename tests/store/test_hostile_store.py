"""Manifests, journals and headers under right checksums, by an attacker: refused with one line before memory goes by them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdcli.store.checksummed_json import add_checksum
from kdcli.store.journal import read_journal
from kdcli.store.manifest import read_manifest, write_manifest
from tests.support.hostile_case import (
    Change,
    attempts,
    entry_file,
    make,
    manifest_file,
    require_harmless,
    require_refused,
    set_at,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store; each attempt leaves it as it was."""
    return make(tmp_path_factory.mktemp("stores") / "s")


HUGE = [2**31, 2**40, 2**62, 2**64, 10**30, 1e308]
NO_NUMBER = [-1, 0.5, True, "4", None, [], {}, float("nan"), float("inf")]
DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]
OUTSIDE = [
    "../../../etc/passwd", "/etc/passwd", "features/../../x", "features\0", "features\\..\\x", "a" * 300, "a/" * 200 + "a",
    "", ".", "Features", "features@all", "fe\u00e4tures", "features\n", 5, None, ["features"], DEEP,
]  # fmt: skip
MANIFESTS: dict[str, list[Any]] = {
    "views": [
        [], "identity", ["identity", "identity"], ["../x", "hflip"], ["identity,hflip", "x"], ["identity\0", "hflip"],
        ["identity", "h/flip"], ["identity", "a" * 5000], [1, 2], {"identity": 1}, None, [["identity"], "hflip"], DEEP,
    ],
    "version": [1, 3, 0, "2", True, None, DEEP],
    "format": ["zarr", None, {}, DEEP],
    "versions": [5, [], "3", DEEP],
    "errors": [5, [], {"encoding": 5}, {"encoding": {"a": 5}}, {"encoding": {"a": {"rms": "x"}}}, DEEP],
    "schema": [None, 5, [], {}, DEEP],
    "schema.rows": [*HUGE, *NO_NUMBER, 0, 13, 15, 28, 14.0],
    "schema.shard_rows": [*HUGE, *NO_NUMBER, 0, 1, 5, 2**20, 4.0],
    "schema.max_boxes": [*HUGE, *NO_NUMBER],
    "schema.canvas": ["99968x99968", "999936", 64, "-32x64", "32x64x3", "32x64\n", "a", [], None, DEEP],
    "schema.grid.strides": [[], [1], [8, 8], [2**70], [0.001], [float("nan")], ["8"], [True] * 5, [8] * 5000, 8, DEEP],
    "schema.grid.scales": [[1.0] * 1000, [], ["x"], [0.0], None],
    "schema.grid.ratios": [[1.0] * 10**5, [-1.0]],
    "schema.grid.stride_rule": ["other", 5, [], {}],
    "schema.tensors": [[], {}, "abc", [5], None, [DEEP]],
    "schema.tensors.0": [5, [], {}, None, "features"],
    "schema.tensors.0.name": OUTSIDE,
    "schema.tensors.0.region": ["everywhere", "main+main", "main+" * 999 + "vlr", "../x", "all+main", "", "gt", 5, DEEP],
    "schema.tensors.0.per": ["level0", "level9", "box", "proposal", "row", "", "../x", None, DEEP],
    "schema.tensors.0.dims": [
        [], [0], [-3], [3.0], [True], ["3"], "3", 3, {"3": 1}, [1] * 9, [1] * 70, [1] * 10**4, [2**20, 2**20], [2**31],
        [2**26], [10**4000] * 8, [[3]], None, DEEP,
    ],
    "schema.tensors.0.encoding": [
        {"name": "pickle"}, {"name": "object"}, {"name": "float64"}, {"name": "vlen-utf8"}, {"name": ""}, {}, None, "zstd",
        {"name": "channel_affine_0"}, {"name": "channel_affine_99"}, {"name": "channel_affine_3"},
        {"name": "channel_affine_8", "bits": 99}, {"name": "channel_affine_8", "bits": 0}, {"name": "float16"},
        {"name": "log_odds_8"}, {"name": "log_odds_8", "low": float("nan"), "high": 8.0},
        {"name": "log_odds_8", "low": -12.0, "high": 1e400}, {"name": "log_odds_8", "low": 8.0, "high": -12.0},
        {"name": "log_odds_8", "low": "a", "high": 8.0}, {"name": ["float16"]}, [["name", "channel_affine_8"]],
        {"name": {"name": "float16"}}, {"name": "a" * 5000}, DEEP,
    ],
    "schema.served": [
        ["ghost@main"], ["rank@vlr"], ["box_regression@main"], ["features@all"], ["features"], ["a@b@c"], [5], [None],
        "features@main", ["features@main", "features@main"], ["../x@main"], [["features", "main"]], {"features": 1},
        ["features@gt"], ["features@main+main"], ["cls_logits@main"], 5, None, DEEP,
    ],
    "schema.images": ["jpeg", "pickle", 5, True, [], {}],
}  # fmt: skip


@pytest.mark.parametrize("path", MANIFESTS)
def test_a_hostile_manifest_is_refused(store: Path, path: str) -> None:
    manifest = read_manifest(store).to_json()
    changes = []
    for k, value in enumerate(MANIFESTS[path]):
        data = manifest_file(set_at(manifest, path, value))
        changes.append(Change(f"{path}[{k}] = {str(value)[:60]}", "zarr.json", data))
    require_refused(attempts(store, changes))


def test_one_tensor_twice_or_as_no_loss_can_decode_it(store: Path) -> None:
    manifest = read_manifest(store).to_json()
    tensors = manifest["schema"]["tensors"]
    sparse = next(k for k, t in enumerate(tensors) if t["region"] == "main+vlr")
    found = [
        set_at(manifest, "schema.tensors", [*tensors, tensors[0]]),
        set_at(manifest, f"schema.tensors.{sparse}.encoding", {"name": "channel_affine_8"}),
        set_at(manifest, f"schema.tensors.{sparse}.encoding", {"name": "box_16"}),
        set_at(manifest, f"schema.tensors.{sparse}.per", "level0"),
    ]
    require_refused(attempts(store, [Change(str(k), "zarr.json", manifest_file(m)) for k, m in enumerate(found)]))


def test_documents_that_break_a_parser(store: Path) -> None:
    manifest = json.dumps(add_checksum(read_manifest(store).to_json()))
    texts = {
        "nested": '{"attributes": {"kdcli": ' + "[" * 10**5 + "]" * 10**5 + "}}",
        "nested dicts": '{"a": ' * 10**5 + "1" + "}" * 10**5,
        "half": manifest[: len(manifest) // 2],
        "digits": '{"attributes": {"kdcli": {"format": "kdcli.store", "version": ' + "1" * 10**5 + "}}}",
        "surrogate": '{"attributes": {"kdcli": {"format": "\\ud800"}}, "zarr_format": 3, "node_type": "group"}',
        "array": '{"attributes": {"kdcli": ' + manifest + '}, "zarr_format": 3, "node_type": "array", "shape": [1]}',
        "extra": '{"attributes": {"kdcli": ' + manifest + ', "x": 1}, "zarr_format": 3, "node_type": "group"}',
        "empty": "",
        "zeros": "\0" * 1000,
    }
    changes = [Change(name, "zarr.json", text.encode()) for name, text in texts.items()]
    changes += [Change(f"journal {n}", "journal/000001.json", t.encode()) for n, t in texts.items()]
    require_refused(attempts(store, changes))


ENTRIES: dict[str, list[Any]] = {
    "shard": [0, 2, 4, 99, -1, 2**70, 1.0, True, "1", None, [], float("nan"), float("inf"), DEEP],
    "rows": [[0, 4], [4, 9], [8, 4], [4.0, 8.0], ["4", "8"], [4], [], [4, 8, 8], None, 4, "48", [-4, 8], [4, 2**64]],
    "files": [None, 5, [], "abc", DEEP],
    "measured": [None, 5, [], "x", {"encoding": 5}, {"encoding": {"rank@main": {"count": 0.0}}},
                 {"encoding": {"rank@main": {"squares": float("nan")}}}, {"precision": {"rank@main": []}}, DEEP],
}  # fmt: skip
FILE_VALUES: dict[str, list[Any]] = {
    "bytes": [-1, 1.5, True, "12", None, 2**64, float("nan"), [], DEEP],
    "crc32c": [None, 5, "zz", "0" * 1000, "", [], "00000000\n"],
}
UNKNOWN = {"bytes": 1, "crc32c": "00000000"}


def test_a_hostile_journal_entry_is_refused(store: Path) -> None:
    entry = read_journal(store)[1].to_json()
    found = [(f"{path} = {str(v)[:60]}", set_at(entry, path, v)) for path, vs in ENTRIES.items() for v in vs]
    files = entry["files"]
    for field, values in FILE_VALUES.items():
        for value in values:
            changed = {**files, "row/identity": {**files["row/identity"], field: value}}
            found.append((f"{field} = {str(value)[:60]}", {**entry, "files": changed}))
    found += [(f"file {name[:60]!r}", {**entry, "files": {**files, name: UNKNOWN}}) for name in OUTSIDE[:10]]
    changes = [Change(name, "journal/000001.json", entry_file(e)) for name, e in found]
    changes += [
        Change("of shard 99", "journal/000099.json", entry_file({**entry, "shard": 99})),
        Change("twice", "journal/1.json", entry_file(entry)),
        Change("no number", "journal/x.json", entry_file(entry)),
    ]
    require_refused(attempts(store, changes))


def test_a_journal_entry_without_a_file_is_refused_by_verify(store: Path) -> None:
    entry = read_journal(store)[1].to_json()
    kept = dict(list(entry["files"].items())[1:])
    found = [{}, kept, {**entry["files"], "row/identity": UNKNOWN}]
    changes = [Change(str(k), "journal/000001.json", entry_file({**entry, "files": f})) for k, f in enumerate(found)]
    require_refused(attempts(store, changes), when_read=False)


HEADERS: dict[str, list[Any]] = {
    "shape": [[2**60, 4], [2**70], [-1], [], None, "x", [1.5], {}, 5, DEEP],
    "data_type": [
        "object", "vlen-utf8", "string", "bytes", "r8", "float128", "", None, 5, [], {"name": "pickle"},
        {"name": "struct", "configuration": {"fields": [["a", "object"]]}},
        {"name": "numpy.datetime64", "configuration": {"unit": "s", "scale_factor": 1}}, DEEP,
    ],
    "chunk_grid.configuration.chunk_shape": [[2**60], [0], [-1], [], None, 5, [2**62, 2**62], DEEP],
    "chunk_grid.name": ["rectangular", "", None, "../x"],
    "chunk_key_encoding.name": ["v2", "../x", None],
    "codecs": [
        [{"name": "pickle"}], [{"name": "numcodecs.pickle"}], [{"name": "vlen-utf8"}], [{"name": "unknown"}], [], None,
        [{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 5}}], [5], "zstd", {}, DEEP,
        [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 10**9, "checksum": False}}],
        [{"name": "sharding_indexed", "configuration": {"chunk_shape": [2**60], "codecs": []}}],
    ],
    "fill_value": ["NaN", None, [1] * 1000, "x", DEEP],
    "node_type": ["group", None],
    "zarr_format": [2, 4, "3", None],
    "storage_transformers": [[{"name": "x"}]],
    "attributes": [5, {"a": 1}, DEEP],
    "dimension_names": [["a"] * 1000, 5],
}  # fmt: skip


def require_headers_refused(store: Path, tmp_path: Path, array: str, headers: dict[str, list[Any]], same: bool) -> None:
    """Nothing but StoreErrors, from verify at the latest; ``same``: by the zarr-python that wrote the store."""
    if not same:  # then zarr-python reads the header, hostile as it is
        store = Path(shutil.copytree(store, tmp_path / "s"))
        write_manifest(store, replace(read_manifest(store), versions={"zarr": "0.0"}))
    header = json.loads((store / array / "zarr.json").read_text())
    changes = []
    for path, values in headers.items():
        for value in values:
            data = json.dumps(set_at(header, path, value)).encode()
            changes.append(Change(f"{path} = {str(value)[:60]}", f"{array}/zarr.json", data))
    changes.append(Change("nested", f"{array}/zarr.json", b'{"shape": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"))
    results = attempts(store, changes)
    if same:
        require_refused(results, when_read=False)
    for result in results:  # to another zarr-python the same header may be spelt otherwise, as with shape 5 for [5]
        require_harmless(result)


# zarr-python has warnings of its own about what it reads here
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("array", "same"), [("image_id", True), ("tensors/features@all/values", False)])
def test_a_hostile_header_of_an_array_is_refused(store: Path, tmp_path: Path, array: str, same: bool) -> None:
    some = {path: values[:3] for path, values in HEADERS.items()}  # zarr-python takes its time
    require_headers_refused(store, tmp_path, array, some, same)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("array", ["image_id", "row/geometry", "entries/count", "tensors/features@all/values"])
def test_a_hostile_header_of_any_array_is_refused(store: Path, tmp_path: Path, array: str, same: bool) -> None:
    require_headers_refused(store, tmp_path, array, HEADERS, same)


@pytest.mark.filterwarnings("ignore")
def test_a_fill_value_of_100_bits_is_refused(store: Path, tmp_path: Path) -> None:
    require_headers_refused(store, tmp_path, "tensors/features@all/values", {"fill_value": [10**30]}, same=True)
