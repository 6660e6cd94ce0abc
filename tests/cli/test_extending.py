"""A detector and a method of a user's own, each in one file: the examples through every command, and wrong plugins."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from kdcli import userfile
from kdcli.cli import main as command_line
from kdcli.cli.main import app, run
from kdcli.detectors.base import Detector, ModelSpec
from kdcli.detectors.build import DETECTORS, build_detector
from kdcli.errors import OptionError
from kdcli.methods import METHODS
from tests.support.command_line import refused
from tests.support.own_parts import MY_DETECTOR, MY_METHOD
from tests.support.small_runs import CANVAS

ROOT = Path(__file__).parents[2]
SMALL = [
    "--canvas", CANVAS, "--epochs", "1", "--batch", "8", "--workers", "0", "--threads", "1", "--views", "identity",
    "--set", "model.tower_convs=1", "--set",
]  # fmt: skip
UNKNOWN = "is unknown; if it is yours, name its file with kdcli --plugin FILE"


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plugins last as long as a process: here, as long as a test."""
    monkeypatch.delenv("KDCLI_PLUGINS", raising=False)
    monkeypatch.setattr(userfile, "_modules", {})
    before = dict(DETECTORS), dict(METHODS)
    yield
    for table, kept in zip((DETECTORS, METHODS), before, strict=True):
        table.clear()  # type: ignore[attr-defined]
        table.update(kept)  # type: ignore[attr-defined]


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it for another new process within a test."""

    def forget() -> None:
        monkeypatch.setattr(userfile, "_modules", {})
        DETECTORS.pop("varifocal", None)
        METHODS.pop("hint", None)

    return forget


def kdcli(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """Run a command that must succeed; returns its JSON."""
    capsys.readouterr()
    code = run([*(str(a) for a in arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_own_detector_and_method_through_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shapes: Path, tmp_path: Path, forget: Any
) -> None:
    own = ["--plugin", MY_DETECTOR, "--plugin", MY_METHOD]
    teacher, store, student = tmp_path / "teacher", tmp_path / "store", tmp_path / "student"
    model = ["--model", "varifocal_shufflenet_v2_x0_5", *SMALL]
    trained = kdcli(capsys, *own, "train", "--data", shapes, *model, "model.fpn_channels=64", "--out", teacher)
    assert trained["epochs"] == 1
    forget()

    cache = ["cache-teacher", "--data", shapes, "--teacher", teacher, "--views", "identity", "--workers", "0"]
    both = ["--method", "hint,ld", "--set", "hint.scope=positives"]
    stored = kdcli(capsys, *own, *cache, *both, "--threads", "1", "--out", store)
    assert set(stored["tensors"]) == {"features@main", "box_distribution@main+vlr", "cls_logits@main"}
    assert stored["teacher"]["model"]["detector"] == "varifocal"
    forget()

    # from the environment, as under torchrun, and the same file by its flag again
    monkeypatch.setenv("KDCLI_PLUGINS", os.pathsep.join([str(MY_METHOD), str(MY_DETECTOR)]))
    distill = ["distill", "--data", shapes, "--cache", store, *both, *model, "model.fpn_channels=32"]
    assert kdcli(capsys, *own, *distill, "--out", student)["epochs"] == 1
    config = (student / "config.toml").read_text()
    assert 'method = "hint,ld"' in config
    assert "weight = 0.5" in config  # the method's default on this detector
    columns = (student / "results.csv").read_text().splitlines()[0].split(",")
    assert {"hint_loss", "loss_cls", "loss_bbox"} <= set(columns)
    assert kdcli(capsys, "eval", student, "--data", shapes, "--workers", "0")["images"] == 6
    assert "varifocal_resnet18" in kdcli(capsys, "models")["models"]
    listed = {m["method"]: m for m in kdcli(capsys, "methods")["methods"]}
    assert listed["hint"]["detectors"]["varifocal"]["weights"] == {"weight": 0.5}
    forget()

    monkeypatch.delenv("KDCLI_PLUGINS")
    for command in (["eval", student, "--data", shapes], ["predict", student, shapes / "val", "--out", tmp_path / "p"]):
        line = refused(capsys, 3, *command)
        assert line == f"error: checkpoint '{student / 'weights' / 'last.pt'}': detector 'varifocal' {UNKNOWN}"
    line = refused(capsys, 3, "train", "--data", shapes, *model, "model.fpn_channels=32", "--out", tmp_path / "again")
    assert "model 'varifocal_shufflenet_v2_x0_5': unknown" in line
    assert line.endswith("(if it is yours, name its file with kdcli --plugin FILE)")


def test_live_teacher(capsys: pytest.CaptureFixture[str], shapes: Path, teacher: Path, tmp_path: Path) -> None:
    """The dense scope, against a teacher of kdcli's own; the method by its class, as ``--method FILE:Class``."""
    student = ["--model", "gfl_shufflenet_v2_x0_5", *SMALL, "model.fpn_channels=32"]
    distill = ["distill", "--data", shapes, "--teacher", teacher, *student, "--out", tmp_path / "run"]
    made = kdcli(capsys, *distill, "--method", f"{MY_METHOD}:Hint", "--set", "hint.weight=1e-3")
    assert made["epochs"] == 1


def test_help_stays_quick_whatever_the_plugins() -> None:
    code = (
        "import sys; from kdcli.cli.main import run; code = run(sys.argv[1:]); "
        "print('exit', code, sorted(set(sys.modules) & {'torch', 'numpy', 'zarr'}))"
    )
    environment = {**os.environ, "KDCLI_PLUGINS": str(MY_DETECTOR)}
    for arguments in (["--help"], ["train", "--help"], ["--plugin", str(MY_METHOD), "distill", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=True
        )
        assert done.stdout.splitlines()[-1] == "exit 0 []", arguments
        assert ("--plugin" in done.stdout) == (len(arguments) == 1)


RECIPE = "from dataclasses import replace\nfrom kdcli.detectors.dense.recipes import GFL\n"
METHOD = "from kdcli.methods.base import Method\n"


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("DETECTORS = {'gfl': 3}", 3, "detector 'gfl' exists already; choose another name"),
        ("DETECTORS = {'tv_fcos': 3}", 3, "detector 'tv_fcos' exists already"),
        (
            "DETECTORS = {'mine': 3}",
            3,
            "detector 'mine' is of type int; it must be a Recipe, a TwoStageRecipe or a class",
        ),
        ("DETECTORS = {'mine': dict}", 3, "detector 'mine' is the class dict; it must be"),
        (RECIPE + "DETECTORS = [GFL]", 3, "DETECTORS is a list; it must be a dictionary"),
        (RECIPE + "DETECTORS = {'My Net': GFL}", 3, "DETECTORS has the name 'My Net'; use a-z, 0-9 and _"),
        (METHOD + "METHODS = {'ld': Method}", 3, "method 'ld' exists already"),
        (
            METHOD + "METHODS = {'mine': Method}",
            3,
            "method 'mine' is the class Method; it must be a class derived from",
        ),
        (METHOD + "METHODS = {'model': Method}", 3, "method 'model': the name means something else"),
        (METHOD + "METHODS = {'training': Method}", 3, "method 'training': the name means something else"),
        (METHOD + "class Mine(Method): pass\nMETHODS = {'mine': Mine}", 3, "class Mine has no title"),
        (
            METHOD + "class Mine(Method): title = evidence = offline = ''\nMETHODS = {'mine': Mine}",
            3,
            "class Mine has no needs; write needs = (Need(name, region), ...)",
        ),
        ("x = 1", 3, "adds nothing: define DETECTORS or METHODS"),
        ("x = 1\nimport nothing_here\n", 2, "failed in line 2 (import nothing_here): ModuleNotFoundError: No module"),
        ("x = 1\n\nif x\n    pass", 2, "failed in line 3 (if x): SyntaxError: expected ':'"),
        (
            "from kdcli.geometry.assign import AssignerSpec\nAssignerSpec(kind='ats')",
            2,
            "failed in line 2 (AssignerSpec(kind='ats')): assigner 'ats' is unknown; did you mean 'atss'?",
        ),
        (None, 3, "does not exist; name a Python file"),
    ],
)
def test_wrong_plugins(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | None, code: int, words: str
) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    before = dict(DETECTORS), dict(METHODS)
    line = refused(capsys, code, "--plugin", file, "version")
    assert line.startswith(f"error: plugin '{file}'")
    assert words in line
    assert before == (DETECTORS, METHODS)


def test_two_plugins_of_one_file_name_and_one_name_twice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        name = "c" if folder == "c" else "b"
        (tmp_path / folder / "mine.py").write_text(RECIPE + f"DETECTORS = {{'{name}': replace(GFL, name='{name}')}}")
    a, b, c = (tmp_path / folder / "mine.py" for folder in "abc")
    assert run(["--plugin", str(a), "--plugin", str(c), "version"]) == 0
    assert {"b", "c"} <= set(DETECTORS)
    assert "detector 'b' exists already" in refused(capsys, 3, "--plugin", b, "version")
    (tmp_path / "mine.txt").write_text("")
    assert "is not a .py file" in refused(capsys, 3, "--plugin", tmp_path / "mine.txt", "version")


def test_a_whole_detector_class() -> None:
    """Built as ``cls(spec)``; what it forgets is named."""
    gfl = build_detector(ModelSpec("gfl", "shufflenet_v2_x0_5", 3, 32, 1))

    class Mine(Detector):
        def __init__(self, spec: ModelSpec) -> None:
            super().__init__()
            self.spec, self.grid = spec, gfl.grid
            self.assigner, self.region_defaults = gfl.assigner, gfl.region_defaults

    class Forgetful(Detector):
        def __init__(self, spec: ModelSpec) -> None:
            super().__init__()
            self.spec, self.grid = spec, gfl.grid

    DETECTORS.update(mine=Mine, forgetful=Forgetful)
    spec = ModelSpec("mine", "shufflenet_v2_x0_5", 3)
    built = build_detector(spec)
    assert isinstance(built, Mine)
    assert built.spec == replace(spec, bn="train")  # `auto` is decided before
    with pytest.raises(OptionError, match=r"detector 'forgetful': Forgetful.__init__ does not set self.assigner"):
        build_detector(replace(spec, detector="forgetful"))
    with pytest.raises(
        OptionError, match=r"detector 'mine' has no attribute backbone .*; leave --backbone-weights out"
    ):
        build_detector(spec, "imagenet")
    with pytest.raises(OptionError, match=f"detector 'another' {UNKNOWN}"):
        build_detector(replace(spec, detector="another"))


def test_the_commands_of_the_page_exist() -> None:
    assert command_line.COMMANDS
    program: Any = typer.main.get_command(app)
    text = (ROOT / "docs" / "extending.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^\$ kdcli (.*)$", text, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line)
        while words[0] == "--plugin":
            words = words[2:]
        program.commands[words[0]].make_context("kdcli", words[1:])
    for name in re.findall(r"examples/extending/\w+\.py", text):
        assert (ROOT / name).is_file()
