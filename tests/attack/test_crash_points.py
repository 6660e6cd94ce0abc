"""A command that is killed at any of its moments is finished by the same command: nothing is lost and nothing is left.

The moments are enumerated, not drawn: see tests/support/crash_points.py. The same bytes as without a kill, but where a clock
is in a file.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.attack.world import HERE, SMALL, make_world
from tests.support.crash_points import Finding, Scenario, chosen, explore

ROOT = Path(__file__).parents[2]
TIMED = ("*/results.csv", "*/metrics.json", "*/env.json", "*.png", "*.html")
TRAIN = [*SMALL, "--set", "train.save_steps=1"]
CACHE = ["--shard-rows", "4", "--micro-batch", "2", *HERE]
COMMON = ["--data", "{}/shapes", "--teacher", "{}/teacher.pt"]
VERIFY = ("cache", "verify", "{}/out")

# what is there before, the command, and whether all of it is the same bytes afterwards
STORES: dict[str, tuple[tuple[str, ...], list[str], str]] = {
    "cache-teacher": ((), ["cache-teacher", *COMMON, "--method", "rm", *CACHE, "--out", "{}/out"], "out"),
    "add": (("store_ld",), ["cache", "add", "{}/store_ld", *COMMON, "--method", "pfi"], "store_ld"),
    "add of entries": (("store_main",), ["cache", "add", "{}/store_main", *COMMON, "--method", "ld"], "store_main"),
    "add images": (("store_ld",), ["cache", "add", "{}/store_ld", *COMMON, "--cache-images"], "store_ld"),
    "prune --tensor": (("store",), ["cache", "prune", "{}/store", "--tensor", "features@all"], "store"),
    "prune --view": (("store",), ["cache", "prune", "{}/store", "--view", "hflip", "--out", "{}/out"], "out"),
    "merge": (
        ("store_identity", "store_hflip"), ["cache", "merge", "{}/store_identity", "{}/store_hflip", "--out", "{}/out"], "out",
    ),
}  # fmt: skip
OTHERS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "train": ((), ["train", "--data", "{}/shapes", "--epochs", "1", *TRAIN, "--seeds", "0", "--out", "{}/out"]),
    "distill": (("store",), ["distill", "--data", "{}/shapes", "--cache", "{}/store", "--method", "ld,pfi", "--epochs", "1",
                *TRAIN, "--seeds", "0", "--out", "{}/out"]),
    "resume": (("stopped",), ["distill", "--resume", "{}/stopped"]),
    "convert": (("mmdet.pth",), ["convert", "{}/mmdet.pth", "--from", "mmdet", "--canvas", "64x96", "--out", "{}/out.pt"]),
    "eval": ((), ["eval", "{}/teacher.pt", "--data", "{}/shapes", *HERE[:2], "--out", "{}/out"]),
    "predict": ((), ["predict", "{}/teacher.pt", "{}/shapes/val", "--out", "{}/out"]),
    "compare": (("run", "plain"), ["compare", "{}/run", "{}/plain", "--html", "{}/out.html", "--plots", "{}/out"]),
    "make-shapes": ((), ["data", "make-shapes", "{}/out", "--train", "2", "--val", "1"]),
}  # fmt: skip
MOST = 12  # of each command in make test-all


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made in a process of its own, which has one thread and so may fork."""
    root = tmp_path_factory.mktemp("crash") / "world"
    code = (
        "import sys; from pathlib import Path; from tests.support.attack import tiny; tiny.install(); "
        "from tests.support.attack.world import make_world; make_world(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(root)], check=True, cwd=ROOT, timeout=300)
    return root


def start(world: Path, tmp_path: Path, needed: tuple[str, ...]) -> Path:
    """A folder with what a command needs."""
    folder = tmp_path / "start"
    shutil.copytree(world / "shapes", folder / "shapes")
    shutil.copy(world / "teacher.pt", folder)
    for name in needed:
        (shutil.copytree if (world / name).is_dir() else shutil.copy)(world / name, folder / name)
    return folder


def tried(world: Path, tmp_path: Path, name: str, most: int) -> tuple[int, list[Finding]]:
    """Crash points of one command, and what was wrong after them."""
    if name in STORES:
        needed, command, out = STORES[name]
        scenario = Scenario(
            start=str(start(world, tmp_path, needed)), commands=(tuple(command),), most=most,
            verify=("cache", "verify", "{}/" + out),
        )  # fmt: skip
    else:
        needed, command = OTHERS[name]
        codes = (0, 3) if name == "convert" else (0,)  # it does not replace what it has finished
        folder = str(start(world, tmp_path, needed))
        scenario = Scenario(start=folder, commands=(tuple(command),), most=most, ignore=TIMED, codes=codes)
    return explore(scenario, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", [*STORES, *OTHERS])
def test_some_points_of_each_command(world: Path, tmp_path: Path, name: str) -> None:
    points, findings = tried(world, tmp_path, name, MOST)
    assert points >= 3
    assert findings == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STORES, *OTHERS])
def test_every_point_of_each_command(world: Path, tmp_path: Path, name: str) -> None:
    points, findings = tried(world, tmp_path, name, 10**9)
    assert points >= 3
    assert findings == []


def test_points_are_chosen_by_kind() -> None:
    events = ["open a/0", "fsync a/0", "open a/1.x", "fsync a/1", "open a/2", "open a/2.x", "unlink b"]
    assert chosen(events, 7) == [0, 1, 2, 3, 4, 5, 6]
    assert chosen(events, 6) == [0, 1, 2, 6]
    assert chosen(events, 2) == [0, 2, 6]


@pytest.mark.full
def test_the_world_is_made_once(world: Path) -> None:
    assert make_world(world).root == world
