"""The recipes under examples/coco: their text, their options, and two steps of each on drawn images of COCO's classes."""

from __future__ import annotations

import csv
import json
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image, ImageDraw

from kdcli.cli import main as command_line
from kdcli.cli.main import app, run
from kdcli.detectors.build import ModelSpec, build_detector, default_lr, parse_model_name
from kdcli.detectors.convert.coco import COCO_CLASSES
from kdcli.detectors.weights import export
from kdcli.files import atomic_save
from kdcli.methods.resolve import find_methods, resolve_options
from kdcli.options import TrainOptions, build
from kdcli.report import plots
from kdcli.structures import Canvas
from kdcli.tensors import FEATURES
from tests.support.selection import matrix

assert command_line.COMMANDS  # registers the commands on ``app``

RECIPES = Path(__file__).parents[2] / "examples" / "coco"
FILES = sorted(RECIPES.glob("*.toml"))
HEIGHT, WIDTH = 64, 96
CANVAS = f"{HEIGHT}x{WIDTH}"
SMALL = "shufflenet_v2_x0_5"
WIDTHS = {"fpn_channels": 16, "head_channels": 32, "tower_convs": 1}
FLAGS = [
    "--canvas", CANVAS, "--epochs", "1", "--batch", "2", "--workers", "0", "--threads", "1",
    "--backbone-weights", "none", *(f"--set=model.{name}={value}" for name, value in WIDTHS.items()),
]  # fmt: skip

# C2 to C5; a neck reads all of them or the last three
CHANNELS = {
    **dict.fromkeys(("resnet18", "resnet34"), (64, 128, 256, 512)),
    **dict.fromkeys(("resnet50", "resnet101", "resnet152", "resnext101_64x4d"), (256, 512, 1024, 2048)),
    "mobilenet_v2_leaky": (24, 32, 96, 320),
}
STORED = ("ld_gfl_r18_r101", "defeat_cls_faster_r50_r152")
# trained at several sizes: in mmdet's configurations these teachers, and R101 from R101-DCN, are the "mstrain" ones
MULTI_SCALE = (
    *(f"teacher_{d}_r101_2x_distribution" for d in ("atss", "fcos", "retinanet")),
    "teacher_gfl_r101_2x",
    "ld_gfl_r101_r101dcn",
)

recipes = pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
# building or training what they say takes a minute
some_recipes = pytest.mark.parametrize("file", matrix(FILES, lambda f: f.stem in STORED), ids=lambda f: f.stem)


def fields_of(file: Path) -> dict[str, Any]:
    """The recipe as plain values."""
    return tomllib.loads(file.read_text())


def on_voc(file: Path) -> bool:
    """Whether the recipe is for PASCAL VOC."""
    return "_voc_" in file.stem


def commands_of(file: Path) -> list[list[str]]:
    """The ``kdcli`` command lines of a recipe's comment, or of a page, without ``kdcli``."""
    text = re.sub(r" \\\n# +", " ", file.read_text())
    return [shlex.split(line, comments=True)[1:] for line in re.findall(r"^(?:# )?(kdcli .*)$", text, re.MULTILINE)]


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five training images, the last one without a box, and two for validation; every class of COCO has a box."""
    root = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(5)
    (root / "annotations").mkdir()
    for split, count, empty in (("train", 5, 1), ("val", 2, 0)):
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        per_image = len(COCO_CLASSES) // (count - empty)
        for i in range(count):
            picture = Image.fromarray(rng.integers(0, 80, (HEIGHT, WIDTH, 3), dtype=np.uint8))
            for category in COCO_CLASSES[i * per_image : (i + 1) * per_image]:
                x, y, w, h = (int(v) for v in rng.integers((0, 0, 12, 12), (60, 36, 36, 28)))
                ImageDraw.Draw(picture).rectangle((x, y, x + w, y + h), fill=tuple(rng.integers(80, 255, 3).tolist()))
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": i + 1, "category_id": category.id, "iscrowd": 0,
                     "bbox": [x, y, w, h], "area": w * h}
                )  # fmt: skip
            picture.save(root / f"{split}2017" / f"{i + 1:012}.png")
            images.append({"id": i + 1, "file_name": f"{i + 1:012}.png", "height": HEIGHT, "width": WIDTH})
        content = {"images": images, "annotations": annotations, "categories": COCO_CLASSES.to_json()}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from detector and box branch to a checkpoint of random weights, each made once."""
    folder = tmp_path_factory.mktemp("teachers")

    @cache
    def teacher(detector: str, box: Any) -> Path:
        torch.manual_seed(11)
        model = build_detector(ModelSpec(detector, SMALL, len(COCO_CLASSES), box=box, **WIDTHS))
        path = folder / f"{detector}_{box}.pt"
        atomic_save(export(model, COCO_CLASSES, CANVAS, {}), path)
        return path

    return teacher


def teacher_of(file: Path, teachers: Any) -> Path:
    model = fields_of(file)["model"]
    path: Path = teachers(parse_model_name(model["name"])[0], model.get("box", "default"))
    return path


def run_recipe(file: Path, out: Path, *arguments: str) -> None:
    """Run a recipe small, and check that each of its methods had a loss."""
    fields = fields_of(file)
    model = f"{parse_model_name(fields['model']['name'])[0]}_{SMALL}"
    line = [fields["command"], "--config", str(file), "--model", model, *FLAGS, *arguments, "--out", str(out)]
    if "steps" in fields["optim"]:
        line.append("--set=optim.steps=[]")  # theirs lie beyond one epoch
    if fields["command"] == "distill":
        line += ["--gradient-limit", "0"]  # the maps of random weights are hundreds apart
    assert run(line) == 0
    assert json.loads((out / "metrics.json").read_text())["epochs"] == 1
    stored = tomllib.loads((out / "config.toml").read_text())
    (epoch,) = csv.DictReader((out / "results.csv").read_text().splitlines())
    for method in filter(None, stored["method"].split(",")):
        terms = {column: float(value) for column, value in epoch.items() if column.startswith(f"{method}_")}
        assert terms
        assert all(0 < value < float("inf") for value in terms.values()), terms
        for option, value in fields.get("methods", {}).get(method, {}).items():
            assert stored["methods"][method][option] == value or option == "imitation_weight"


@recipes
def test_recipe_is_valid(file: Path) -> None:
    fields = fields_of(file)
    options = build(TrainOptions, fields)
    assert (options.canvas, options.batch) == ("800x1344", 16)
    assert options.views == ("scale-24" if file.stem in MULTI_SCALE else "identity,hflip")
    assert options.skip_empty
    assert options.amp == "fp32"
    assert options.backbone_weights == "imagenet"
    detector, backbone = parse_model_name(options.model.name)
    assert detector != "faster_rcnn"  # torchvision's: the papers have mmdet's
    assert options.optim.lr == default_lr(detector) == (0.02 if detector == "mm_faster_rcnn" else 0.01)
    assert options.optim.clip == (35.0 if file.stem.startswith("defeat") else 0.0)
    assert options.model.bn == ("frozen" if detector == "fcos" else "train" if "mobilenet" in backbone else "auto")
    assert (options.epochs, options.optim.steps) in (
        [(12, (9,)), (48, (36,))] if on_voc(file) else [(12, None), (24, None)]
    )
    methods = find_methods(options.method) if options.method else {}
    assert set(options.methods) <= set(methods)
    for name, method in methods.items():
        resolve_options(name, method, detector, options.methods.get(name, {}))
    assert bool(methods) == (options.command == "distill")


@recipes
def test_recipe_says_what_was_published_and_how_to_run_it(file: Path) -> None:
    text = file.read_text()
    (published,) = re.findall(r"^# Published AP: (.*)$", text, re.MULTILINE)
    assert re.search(r"\((paper abstract|README of the official code|third-party notes)|none found", published)
    command = fields_of(file)["command"]
    last = commands_of(file)[-1]
    assert last[:3] == [command, "--config", f"examples/coco/{file.name}"]
    assert last[3:5] == ["--data", "VOC" if on_voc(file) else "COCO"]
    assert f"`{file.name}`" in (RECIPES / "README.md").read_text()
    for named in re.findall(r"\S+\.toml", text):
        assert (RECIPES / Path(named).name).is_file()


@pytest.mark.parametrize("page", [RECIPES / "README.md", *FILES], ids=lambda f: f.stem)
def test_commands_parse(page: Path) -> None:
    cli: Any = typer.main.get_command(app)
    for name, *arguments in commands_of(page):
        cli.commands[name].make_context(name, arguments)


@recipes
def test_stored_options_are_those_of_the_recipe(file: Path) -> None:
    fields = fields_of(file)
    stores = [c for c in commands_of(file) if c[0] == "cache-teacher"]
    for command in stores:
        assert command[command.index("--method") + 1] == fields["method"]
        assert command[command.index("--canvas") + 1] == fields["canvas"]
        for value in (command[i + 1] for i, word in enumerate(command) if word == "--set"):
            table, _, assignment = value.partition(".")
            key, _, given = assignment.partition("=")
            assert str(fields["methods"][table][key]) == given
    assert len(stores) == (fields["command"] == "distill" and "--teacher" not in commands_of(file)[-1])


@some_recipes
def test_recipe_builds_its_own_backbone(file: Path) -> None:
    """The runs below have a small backbone; here each recipe's own goes through its neck and heads, without numbers."""
    model = build(TrainOptions, fields_of(file)).model
    detector, backbone = parse_model_name(model.name)
    built, outputs = run_on_meta(
        ModelSpec(detector, backbone, len(COCO_CLASSES), model.fpn_channels, model.tower_convs, box=model.box)
    )
    assert built.backbone.stage_channels == CHANNELS[backbone]
    laterals = [m for m in built.neck.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1)]
    assert tuple(conv.in_channels for conv in laterals) == CHANNELS[backbone][-len(laterals) :]
    assert len(laterals) == (4 if detector == "mm_faster_rcnn" else 3)
    assert outputs[FEATURES].shape == (1, built.grid.num_cells(Canvas(HEIGHT, WIDTH)), 256)


@cache
def run_on_meta(spec: ModelSpec) -> tuple[Any, Any]:
    """A detector of shapes alone, and its outputs for one image."""
    with torch.device("meta"):
        detector = build_detector(spec)
        return detector, detector(torch.zeros(1, 3, HEIGHT, WIDTH))


@some_recipes
def test_recipe_runs_two_steps(
    file: Path, coco: Path, teachers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # half the time of such a run; other tests look at the plots
    monkeypatch.setattr(plots, "plot_run", lambda run, path: None)
    arguments = ["--data", str(coco)]
    if fields_of(file)["command"] == "distill":
        arguments += ["--teacher", str(teacher_of(file, teachers))]
    if file.stem.startswith("ld_gi_"):
        # two nets of random weights differ by more than a guard allows the first gradient to be
        arguments.append("--set=ld.imitation_weight=0.01")
    run_recipe(file, tmp_path / "run", *arguments)
    assert "left out: 1 of 5 images, which have no box" in capsys.readouterr().err


@pytest.mark.parametrize("stem", matrix(STORED))
def test_recipe_runs_from_the_store_of_its_comment(stem: str, coco: Path, teachers: Any, tmp_path: Path) -> None:
    file = RECIPES / f"{stem}.toml"
    (command,) = (c for c in commands_of(file) if c[0] == "cache-teacher")
    places = {"--data": coco, "--teacher": teacher_of(file, teachers), "--canvas": CANVAS, "--out": tmp_path / "store"}
    for flag, value in places.items():
        command[command.index(flag) + 1] = str(value)
    assert run([*command, "--workers", "0", "--threads", "1"]) == 0
    run_recipe(file, tmp_path / "run", "--data", str(coco), "--cache", str(tmp_path / "store"))


@pytest.mark.parametrize(
    ("detector", "times"), matrix([("gfl", 0), ("retinanet", 1)], lambda case: case[0] == "retinanet")
)
def test_bckd_off_gfl_says_that_its_weights_are_ours(
    detector: str, times: int, coco: Path, teachers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(plots, "plot_run", lambda run, path: None)
    distill = ["distill", "--data", str(coco), "--teacher", str(teachers(detector, "default")), "--method", "bckd"]
    assert run([*distill, "--model", f"{detector}_{SMALL}", *FLAGS, "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err.count("bckd: its authors released weights for gfl only") == times


@pytest.mark.full
def test_skip_empty(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "--data", str(coco), "--model", f"gfl_{SMALL}", *FLAGS]
    assert run([*train, "--out", str(tmp_path / "all")]) == 0
    assert "left out" not in capsys.readouterr().err
    assert not tomllib.loads((tmp_path / "all" / "config.toml").read_text())["skip_empty"]
    assert run([*train, "--set", "train.skip_empty=true", "--out", str(tmp_path / "filled")]) == 0
    assert "left out: 1 of 5 images" in capsys.readouterr().err
    assert tomllib.loads((tmp_path / "filled" / "config.toml").read_text())["skip_empty"]
    empty = tmp_path / "empty"
    (empty / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (empty / f"{split}2017").symlink_to(coco / f"{split}2017")
        name = f"instances_{split}2017.json"
        content = json.loads((coco / "annotations" / name).read_text())
        (empty / "annotations" / name).write_text(json.dumps({**content, "annotations": []}))
    train[2] = str(empty)
    assert run([*train, "--set", "train.skip_empty=true", "--out", str(tmp_path / "none")]) == 3
    assert "no box to train on: there is no annotation" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
