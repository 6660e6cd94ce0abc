"""What commit 87eafca wrote, in ``made_by_87eafca``, is used by the code of today: opened, resumed, extended, trained from.

Where this machine rounds as the one that made it did, which a store written here shows, bytes and losses must be the same.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdcli.cli.main import run
from kdcli.detectors.base import ModelSpec
from kdcli.methods import METHODS
from kdcli.methods.resolve import completed
from kdcli.options import TrainOptions, build
from kdcli.store.reader import StoreReader
from kdcli.structures import RowKey
from tests.compat import tiny_backbone

pytestmark = pytest.mark.filterwarnings("ignore:head of . channels. GroupNorm:UserWarning")

MADE = Path(__file__).parent / "made_by_87eafca"
FACTS: dict[str, Any] = json.loads((MADE / "facts.json").read_text())
# columns of results.csv that a clock or the operating system decides
MEASURED = {"images_per_s", "data_wait_percent", "teacher_percent", "epoch_s", "peak_memory_bytes"}
LOSSES = ("loss_cls", "loss_bbox", "loss_dfl", "ld_main", "ld_vlr", "ld_kd", "rm_cls", "rm_loc", "loss")
FIRST_SHARD = "/c/0/"
HERE = ["--threads", "1", "--workers", "0"]


@pytest.fixture(scope="module", autouse=True)
def _backbone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        tiny_backbone.install(patch)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of everything, which no test changes: in another place than where it was made."""
    folder = Path(shutil.copytree(MADE, tmp_path_factory.mktemp("compat") / "made"))
    for name in ("run", "run_killed"):
        (folder / name / "plots").mkdir()  # git keeps no empty folder
    weights = folder / "run_killed" / "weights"
    shutil.copy(weights / "last.pt", weights / "best.pt")  # after one epoch they are the same: one is kept
    return folder


def cache_teacher(made: Path, out: Path, method: str = "ld,rm") -> int:
    """The command that wrote the store."""
    where = ["--data", str(made / "shapes"), "--teacher", str(made / "teacher.pt"), "--out", str(out)]
    return run(["cache-teacher", *where, "--method", method, "--shard-rows", "4", "--micro-batch", "2", *HERE])


@pytest.fixture(scope="module")
def fresh_store(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store, written by the code of today."""
    out = tmp_path_factory.mktemp("fresh") / "store"
    assert cache_teacher(made, out) == 0
    return out


@pytest.fixture(scope="module")
def same_rounding(made: Path, fresh_store: Path) -> bool:
    """Whether the teacher's numbers are, to the last bit, those of the machine that made the files."""
    journals = [[f.read_bytes() for f in sorted((s / "journal").glob("*.json"))] for s in (made / "store", fresh_store)]
    return journals[0] == journals[1]  # the checksum of every shard file and the sums of all errors, in full precision


@pytest.fixture(scope="module")
def fresh_run(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the old store by the old recipe, as the finished old run was made."""
    out = tmp_path_factory.mktemp("fresh") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)  # the recipe's paths are relative
        assert run(["distill", "--config", "recipe.toml", *HERE, "--out", str(out)]) == 0
    return out


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file but locks."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.suffix != ".lock"]
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def shards(folder: Path) -> dict[str, str]:
    """sha256 of every shard file."""
    return {name: found for name, found in contents(folder).items() if "/c/" in name}


def out_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What a command that must succeed prints."""
    capsys.readouterr()
    code = run([*(str(a) for a in arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def state(files: Iterable[Path]) -> dict[Path, tuple[int, int, bytes]]:
    """What changes when a file is written again, even with the same bytes."""
    return {f: (f.stat().st_mtime_ns, f.stat().st_ino, f.read_bytes()) for f in files if f.is_file()}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def manifest(store: Path) -> dict[str, Any]:
    """Without what is summed up at the end of writing, and the checksum over it."""
    whole: dict[str, Any] = read_json(store / "zarr.json")["attributes"]["kdcli"]
    return {k: v for k, v in whole.items() if k not in ("errors", "sha256")}


def results(folder: Path) -> list[dict[str, str]]:
    """results.csv without what is measured."""
    rows = csv.DictReader((folder / "results.csv").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def require_same_run(folder: Path, old: Path, exact: bool) -> None:
    """The losses and weights of two runs: bit for bit, or as near as another processor comes."""
    ours, theirs = results(folder), results(old)
    assert len(ours) == len(theirs) == 3
    assert [list(row) for row in ours] == [list(row) for row in theirs]
    if exact:
        assert ours == theirs
        assert read_json(folder / "metrics.json")["weights_sha256"] == read_json(old / "metrics.json")["weights_sha256"]
    for mine, before in zip(ours, theirs, strict=True):
        for name in LOSSES:
            assert float(mine[name]) == pytest.approx(float(before[name]), rel=0.02, abs=1e-5), name


def test_a_store_opens_with_the_same_contents(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    """Everything that ``cache info`` says, of a whole store and of one whose writing was killed."""
    assert out_json(capsys, "cache", "info", made / "store") == FACTS["store"]["info"]
    assert out_json(capsys, "cache", "info", made / "store_killed") == FACTS["store_killed"]["info"]
    assert FACTS["store"]["info"]["complete"]
    assert (FACTS["store_killed"]["info"]["shards_done"], FACTS["store_killed"]["info"]["shards"]) == (1, 3)


def test_a_store_is_verified(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    """Every checksum, and a row of every image by the old checkpoint of the teacher."""
    again = ("--teacher", made / "teacher.pt", "--data", made / "shapes", "--rows", 6)
    found = out_json(capsys, "cache", "verify", made / "store", *again)
    assert found["files"] == len([name for name in shards(made / "store") if not name.startswith("image_id")]) == 33
    assert found["rows_compared"] == 6
    stored = out_json(capsys, "cache", "info", made / "store")["tensors"]
    assert found["differences"].keys() == stored.keys() == {"box_distribution@main+vlr", "cls_logits@main", "rank@main"}
    for key, difference in found["differences"].items():  # nothing but the error of the encoding, of half of the rows
        assert 0 < difference["worst"] <= 1.01 * stored[key]["error"]["worst"], key
        assert difference["rms"] < 2 * stored[key]["error"]["rms"], key


def test_a_damaged_store_is_found(made: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(made / "store", tmp_path / "store"))
    file = store / "tensors" / "cls_logits@main" / "values" / "c" / "1" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert run(["cache", "verify", str(store)]) == 4


def whole_options(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tables of methods with the options that have come since, which change nothing at their defaults; None is not written."""
    whole = {name: completed(METHODS[name], table) for name, table in tables.items()}
    return {
        name: {k: v for k, v in table.items() if v is not None or k in tables[name]} for name, table in whole.items()
    }


def test_today_writes_the_same_manifest(made: Path, fresh_store: Path) -> None:
    """All that a store's numbers depend on; versions and places are those of their writer."""
    ours, theirs = manifest(fresh_store), manifest(made / "store")
    assert list(ours.pop("method_needs")) == ["ld", "rm"]  # since format version 2
    assert list(ours) == list(theirs)
    specs = [ModelSpec.from_json(m["teacher"].pop("model")) for m in (ours, theirs)]
    assert specs[0] == specs[1]  # a field that is written since then has its default
    assert ours.pop("method_options") == whole_options(theirs.pop("method_options"))
    assert (ours["version"], theirs["version"]) == (2, 1)
    for key in theirs.keys() - {"versions", "origin", "version"}:
        assert ours[key] == theirs[key], key
    assert ours["origin"] == {"data": str(made / "shapes"), "teacher": str(made / "teacher.pt")}
    assert contents(fresh_store).keys() == contents(made / "store").keys()


def test_today_writes_the_same_bytes(made: Path, fresh_store: Path, same_rounding: bool) -> None:
    """What the ground truth alone decides on every machine, what the teacher decides where it rounds alike."""
    ours, theirs = shards(fresh_store), shards(made / "store")
    exact = ours.keys() if same_rounding else {name for name in ours if not name.startswith("tensors/")}
    exact = {name for name in exact if not name.startswith("row/identity/")}  # of 64 bytes in today's format
    for row in (RowKey(image, view) for image in StoreReader(fresh_store).image_ids for view in ("identity", "hflip")):
        here, before = StoreReader(fresh_store).read(row), StoreReader(made / "store").read(row)
        assert (here.content, here.guard) == (before.content, before.guard)
    assert {name: ours[name] for name in exact} == {name: theirs[name] for name in exact}


def test_a_killed_store_is_finished(
    capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path, same_rounding: bool
) -> None:
    """By the same command; what the killed process had finished is not written again."""
    store = Path(shutil.copytree(made / "store_killed", tmp_path / "store"))
    before = state(f for f in store.rglob("*") if FIRST_SHARD in f.as_posix() or f.name == "000000.json")
    assert len(before) == 12  # eleven arrays and the journal
    assert cache_teacher(made, store) == 0
    assert state(before) == before
    assert manifest(store) == manifest(made / "store_killed") == manifest(made / "store")
    assert contents(store).keys() == contents(made / "store").keys()
    assert out_json(capsys, "cache", "verify", store)["files"] == 33
    if same_rounding:
        assert contents(store) == contents(made / "store")
    assert cache_teacher(made, store) == 0  # and is then left alone
    assert state(before) == before


def test_a_killed_store_is_not_finished_as_another(made: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(made / "store_killed", tmp_path / "store"))
    before = contents(store)
    assert cache_teacher(made, store, "ld") == 4
    assert contents(store) == before


def test_a_store_is_extended(
    capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path, same_rounding: bool
) -> None:
    """``cache add``: the old shards stay, and the whole is what one command writes."""
    store, whole = Path(shutil.copytree(made / "store", tmp_path / "store")), tmp_path / "whole"
    where = ("--teacher", made / "teacher.pt", "--data", made / "shapes")
    out_json(capsys, "cache", "add", store, "--method", "pfi", *where)
    before, after = shards(made / "store"), shards(store)
    assert {name: after[name] for name in before} == before
    added = {name.split("/")[1] for name in after.keys() - before.keys()}
    assert added == {"features@all", "cls_logits@all"}
    verified = out_json(capsys, "cache", "verify", store, *where)
    assert verified["differences"].keys() == {*FACTS["store"]["info"]["tensors"], *added}
    assert cache_teacher(made, whole, "ld,rm,pfi") == 0
    assert after.keys() == shards(whole).keys()
    if same_rounding:
        assert after == shards(whole)


def test_a_store_is_pruned(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(made / "store", tmp_path / "store"))
    assert run(["cache", "prune", str(store), "--tensor", "rank@main"]) == 0
    assert out_json(capsys, "cache", "info", store)["tensors"].keys() == {
        "box_distribution@main+vlr",
        "cls_logits@main",
    }
    left = {name: found for name, found in shards(made / "store").items() if "rank@main" not in name}
    assert shards(store) == left
    out_json(capsys, "cache", "verify", store)


def test_a_recipe_trains_from_a_store(made: Path, fresh_run: Path, same_rounding: bool) -> None:
    """The settings are resolved as they were, and every loss is the same."""
    require_same_run(fresh_run, made / "run", same_rounding)
    ours, theirs = (tomllib.loads((r / "config.toml").read_text()) for r in (fresh_run, made / "run"))
    moved = {"data": str(made / "shapes"), "cache": str(made / "store")}
    # a field that is written since then has its default
    moved["methods"] = whole_options(theirs["methods"])
    assert build(TrainOptions, ours) == build(TrainOptions, theirs | moved)
    assert theirs.keys() <= ours.keys()
    env, old = read_json(fresh_run / "env.json"), read_json(made / "run" / "env.json")
    assert env["store"] == old["store"] == FACTS["store"]["digest"]
    assert (env["data_sha256"], env["teacher_sha256"]) == (old["data_sha256"], old["teacher_sha256"])
    assert env.keys() == old.keys() | {"settings", "digest"}
    # what approximates the paper's loss is named since then
    old_metrics = read_json(made / "run" / "metrics.json").keys()
    assert read_json(fresh_run / "metrics.json").keys() == old_metrics | {"approximations", "run", "results", "digest"}


def test_a_live_teacher_is_an_old_checkpoint(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    found = out_json(capsys, "eval", made / "teacher.pt", "--data", made / "shapes", "--workers", "0")
    assert found["images"] == 2
    out = tmp_path / "run"
    fields = [
        "--data",
        str(made / "shapes"),
        "--teacher",
        str(made / "teacher.pt"),
        "--model",
        "gfl_tiny",
        "--method",
        "rm",
    ]
    sizes = ["--set", "model.fpn_channels=4", "--set", "model.tower_convs=1", "--epochs", "1", "--batch", "2"]
    assert run(["distill", *fields, *sizes, *HERE, "--out", str(out)]) == 0
    weights = FACTS["store"]["info"]["teacher"]["weights_sha256"]
    assert read_json(out / "env.json")["teacher_sha256"] == weights


def test_an_unfinished_run_goes_on_to_its_end(made: Path, tmp_path: Path, same_rounding: bool) -> None:
    """From the state of its fourth step of nine, with data and store in another place."""
    folder = Path(shutil.copytree(made / "run_killed", tmp_path / "run"))
    resumable = folder / "weights" / "state.pt"
    assert resumable.is_file()
    assert len(results(folder)) == 1
    moved = ["--data", str(made / "shapes"), "--cache", str(made / "store")]
    assert run(["distill", "--resume", str(folder), *moved, "--batch", "4"]) == 3  # a run keeps its settings
    assert run(["distill", "--resume", str(folder), *moved]) == 0
    assert not resumable.exists()
    assert results(folder)[0] == results(made / "run")[0]
    require_same_run(folder, made / "run", same_rounding)


def test_runs_are_compared(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    """A finished old run beside a baseline of today: table and report."""
    fields = [
        "--data",
        str(made / "shapes"),
        "--model",
        "gfl_tiny",
        "--canvas",
        "96x128",
        "--epochs",
        "3",
        "--batch",
        "2",
    ]
    sizes = ["--set", "model.fpn_channels=4", "--set", "model.tower_convs=1", *HERE]
    assert run(["train", *fields, *sizes, "--out", str(tmp_path / "baseline")]) == 0
    report = tmp_path / "report.html"
    found = out_json(capsys, "compare", made / "run", tmp_path / "baseline", "--html", report)
    assert [group["name"] for group in found["groups"]] == ["baseline", "ld+rm"]
    group, old = found["groups"][1], read_json(made / "run" / "metrics.json")
    assert (group["role"], group["methods"], group["model"], group["seeds"]) == (
        "distill",
        ["ld", "rm"],
        "gfl_tiny",
        [5],
    )
    for name in ("ap50", "wall_s", "peak_memory_bytes", "store_bytes", "parameters", "per_class"):
        assert group[name] == old[name], name
    assert group["ap"]["mean"] == old["ap"]
    assert found["unfinished"] == []
    assert "ld+rm" in report.read_text()
    unfinished = out_json(capsys, "compare", made / "run", made / "run_killed")
    assert len(unfinished["unfinished"]) == 1


def test_a_finished_run_stays_as_it_is(made: Path, tmp_path: Path) -> None:
    """``--resume`` gives its metrics and trains nothing."""
    folder = Path(shutil.copytree(made / "run", tmp_path / "run"))
    assert run(["distill", "--resume", str(folder)]) == 0
    kept = {name: found for name, found in contents(folder).items() if not name.startswith("plots/")}
    assert kept == contents(made / "run")
