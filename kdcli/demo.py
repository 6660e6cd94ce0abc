"""The whole product on a drawn data set, on a CPU, in minutes: what ``kdcli demo`` runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kdcli.data.coco import open_split
from kdcli.data.images import decode_image
from kdcli.data.shapes import make_shapes
from kdcli.detectors.weights import load_detector
from kdcli.engine.caching.plan import plan_store
from kdcli.engine.caching.show import read_for_show
from kdcli.engine.caching.write import write_store
from kdcli.engine.evaluation.predict import predict_files
from kdcli.engine.runtime.device import pick_device
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.engine.training import launch, run_config
from kdcli.errors import OptionError
from kdcli.options import CacheOptions
from kdcli.report.compare import Comparison, compare, load_runs
from kdcli.report.draw import draw_detections, save_png, side_by_side
from kdcli.report.html import write_html
from kdcli.report.plots import plot_run, write_plots
from kdcli.report.row import draw_row
from kdcli.report.runs import load_run
from kdcli.structures import Canvas

CANVAS = "192"
TEACHER = {"name": "gfl_resnet18", "fpn_channels": 64, "tower_convs": 2}
STUDENT = {"name": "gfl_shufflenet_v2_x0_5", "fpn_channels": 32, "tower_convs": 2}
TEACHER_EPOCHS, STUDENT_EPOCHS = 18, 8
# from scratch in minutes: 8 epochs of it gave the student the AP of 12 epochs of SGD (6.7 and 6.8)
OPTIM = {"name": "adamw", "lr": 0.005, "weight_decay": 0.02, "schedule": "cosine"}
IMAGES = (300, 100)  # training, validation
# of what was tried on such a student, trained from random weights for 8 epochs, these helped (docs/results/demo.md)
METHODS = ("bckd", "ld,bckd")
MARKER = ".kdcli-demo"  # says that a folder is a demo's, which --overwrite may replace
MADE = ("shapes", "runs", "store", "plots", "report.html", "detections.png", "row.png")
PICTURES = 3
SCORE = 0.25  # detections are drawn from here on


def clear_folder(out: Path, *, overwrite: bool) -> None:
    """Make ``out`` an empty folder of a demo; with ``overwrite`` what a former demo made in it goes first.

    Raises OptionError for a file, and for a folder with anything else in it.
    """
    if out.exists() and not out.is_dir():
        raise OptionError(f"--out '{out}' is a file; name a folder")
    if out.exists() and any(out.iterdir()):
        if not overwrite or not (out / MARKER).is_file():
            raise OptionError(f"'{out}' is not empty; choose another --out, or replace a former demo with --overwrite")
        for name in MADE:  # and nothing else: people keep files anywhere
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


def run_demo(out: Path, *, quick: bool, reporter: ProgressReporter) -> Comparison:
    """Shapes, teacher, store, students, pictures and report in the folder ``out``; returns the comparison.

    ``quick``: a tenth of the images and one epoch each.
    """
    shrink = 10 if quick else 1
    reporter.message(f"1/5 drawing {IMAGES[0] // shrink} training and {IMAGES[1] // shrink} validation images")
    make_shapes(out / "shapes", num_train=IMAGES[0] // shrink, num_val=IMAGES[1] // shrink, seed=0)
    reporter.message(f"2/5 training the teacher, {TEACHER['name']}")
    _train(out, "teacher", TEACHER, TEACHER_EPOCHS, quick, reporter, amp=_teacher_amp())
    reporter.message(f"3/5 running the teacher once: what {' and '.join(METHODS)} read goes to the store")
    _cache(out, reporter)
    reporter.message(f"4/5 training students, {STUDENT['name']}: plain, then distilled from the store")
    _train(out, "baseline", STUDENT, STUDENT_EPOCHS, quick, reporter)
    for method in METHODS:
        name = method.replace(",", "-")
        _train(out, name, STUDENT, STUDENT_EPOCHS, quick, reporter, method=method, cache=str(out / "store"))
    reporter.message("5/5 comparing")
    comparison = compare(load_runs([out / "runs"]), out / "runs" / "baseline")
    write_html(comparison, out / "report.html")
    write_plots(comparison, out / "plots")
    _pictures(out)
    return comparison


def _teacher_amp() -> str:
    """bf16 where the CPU computes in it (a ResNet-18 epoch took 10.4 s, 16.0 s in fp32); the small student gains nothing."""
    # torch 2.11 cannot say what the CPU has
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if has.get("amx_bf16") or has.get("avx512_bf16") else "auto"


def _train(
    out: Path, name: str, model: dict[str, Any], epochs: int, quick: bool, reporter: ProgressReporter, **options: str
) -> None:
    command = "distill" if "method" in options else "train"
    fields = {
        "data": str(out / "shapes"), "canvas": CANVAS, "epochs": 1 if quick else epochs, "batch": 8, "model": model,
        "optim": OPTIM, "eval_every": 1 if quick else epochs // 2, **options,
    }  # fmt: skip
    run, _ = launch.start(
        run_config.from_flags(command, fields, {}, None, {}), out / "runs" / name, reporter, overwrite=False
    )
    plot_run(load_run(run), run / "plots" / "training.png")


def _cache(out: Path, reporter: ProgressReporter) -> None:
    options = CacheOptions(data=str(out / "shapes"), teacher=str(out / "runs" / "teacher"), method=",".join(
        dict.fromkeys(name for methods in METHODS for name in methods.split(","))
    ))  # fmt: skip
    write_store(plan_store(options, reporter), out / "store", reporter)


def _pictures(out: Path) -> None:
    """Teacher, baseline and student side by side on validation images, and one row of the store."""
    val = open_split(out / "shapes", "val")
    names = val.classes.names
    counts = np.array([len(val.training_boxes(i)[1]) for i in range(val.num_images)])
    chosen = sorted(np.argsort(-counts, kind="stable")[:PICTURES].tolist())
    files = [val.image_path(i) for i in chosen]
    columns: list[list[Any]] = []
    truth = []
    for i, file in zip(chosen, files, strict=True):
        pixels, _ = decode_image(file, val.image_size(i))
        boxes, labels = val.training_boxes(i)
        truth.append(draw_detections(pixels, boxes, [names[k] for k in labels], classes=names))
    columns.append([("ground truth", p) for p in truth])
    for run in ("teacher", "baseline", METHODS[0]):
        detector, meta = load_detector(out / "runs" / run)
        column = []
        for p in predict_files(
            detector, files, Canvas.parse(meta.canvas), pick_device("auto"), meta.classes,
            out / "runs" / run / "plots" / "detections.json",
        ):  # fmt: skip
            keep = p.scores >= SCORE
            drawn = draw_detections(
                p.pixels, p.boxes[keep], [names[k] for k in p.labels[keep]], p.scores[keep], classes=names
            )
            column.append((run, drawn))
        columns.append(column)
    rows = [side_by_side([column[k] for column in columns]) for k in range(len(files))]
    sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    save_png(sheet, out / "detections.png")
    train = open_split(out / "shapes", "train")
    largest = int(np.argmax([len(train.training_boxes(i)[1]) for i in range(train.num_images)]))
    save_png(
        draw_row(read_for_show(out / "store", str(out / "shapes"), train.image_id(largest), None)), out / "row.png"
    )
