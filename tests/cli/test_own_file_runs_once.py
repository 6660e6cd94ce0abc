"""A method's file runs once in a process, however often a command asks for it: one class, one set of side effects."""

from __future__ import annotations

from pathlib import Path

from kdcli.cli.main import run
from kdcli.methods.resolve import find_methods, name_methods
from kdcli.userfile import run_file
from tests.support.small_runs import CANVAS

MINE = '''
from pathlib import Path

from kdcli.methods.pkd import PKD

with Path(__file__).with_name("runs.log").open("a") as log:
    log.write("once\\n")


class Mine(PKD):
    """The same loss under another name."""
'''


def executions(file: Path) -> int:
    return len(file.with_name("runs.log").read_text().splitlines())


def test_in_each_command(shapes: Path, teacher: Path, tmp_path: Path) -> None:
    for folder in ("caching", "training"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(MINE)
    file, store = tmp_path / "caching" / "mine.py", str(tmp_path / "store")
    common = ["--data", str(shapes), "--threads", "1", "--workers", "0"]
    cache = ["cache-teacher", *common, "--teacher", str(teacher), "--method", f"{file}:Mine", "--out", store]
    assert run(cache) == 0
    assert executions(file) == 1
    other = tmp_path / "training" / "mine.py"
    student = ["--model", "gfl_shufflenet_v2_x0_5", "--canvas", CANVAS, "--epochs", "1", "--batch", "8"]
    small = ["--set", "model.fpn_channels=64", "--set", "model.tower_convs=1", "--set", "mine.weight=2.0"]
    assert run(["distill", *common, "--cache", store, "--method", f"{other}:Mine", *student, *small, "--out",
                str(tmp_path / "run")]) == 0  # fmt: skip
    assert executions(other) == 1
    assert executions(file) == 1


def test_one_class_by_any_path_and_two_files_of_one_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(MINE)
    a, b = (tmp_path / folder / "mine.py" for folder in "ab")
    (tmp_path / "link.py").symlink_to(a)
    for path in (a, tmp_path / "link.py", b):
        name_methods(f"{path}:Mine")
    first, again, linked, other = (find_methods(f"{p}:Mine")["mine"] for p in (a, a, tmp_path / "link.py", b))
    assert first is again is linked
    assert other is not first
    assert run_file("plugin", a) is not run_file("plugin", b)
    assert executions(a) == executions(b) == 1
