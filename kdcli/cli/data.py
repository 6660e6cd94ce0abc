"""``kdcli data make-shapes`` and ``kdcli data check``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kdcli.cli import flags as f
from kdcli.cli.app import app
from kdcli.limits import MAX_IMAGES, MAX_SEED

data = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Make and check data sets.\n\nExample: kdcli data check DATA"
)
app.add_typer(data, name="data")


@data.command(name="make-shapes")
def make_shapes(
    out: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    train: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help="Training images.")] = 300,
    val: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help="Validation images.")] = 100,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="The same seed draws the same images.")] = 0,
) -> int:
    """Draw a set of textured, rotated, occluded shapes in COCO layout.

    Example: kdcli data make-shapes shapes --train 300 --val 100
    """
    from kdcli.cli.outputs import require_folder
    from kdcli.data.shapes import make_shapes as draw
    from kdcli.report.console import human_console, say

    require_folder(out, "OUT")
    draw(out, num_train=train, num_val=val, seed=seed)
    say(human_console(), f"{out}: {train} training and {val} validation images")
    return 0


@data.command()
def check(
    root: Annotated[Path, typer.Argument(help="Data set folder.", show_default=False)],
    clip_boxes: f.ClipBoxes = None, exif: f.Exif = None,
    json: f.Json = False,
) -> int:  # fmt: skip
    """List what is wrong with a data set; exits with 3 on a fault.

    Faults: missing or corrupt images, unknown categories, duplicate ids, one file under several ids with other boxes,
    boxes outside, no box to train on, no train or val split, splits of different categories. Warnings: boxes over the
    border by up to 2 px (clipped), sides under 1 px (dropped), impossible areas, EXIF orientations, names that look alike,
    classes that one split lacks, images in both splits.

    Example: kdcli data check DATA
    """
    from kdcli.cli.json_output import print_json
    from kdcli.data.check import check_dataset
    from kdcli.data.check_splits import category_fault, class_warnings, missing_report, open_splits, shared_pictures
    from kdcli.data.reading import Reading
    from kdcli.options import Exif, convert
    from kdcli.report.progress import ConsoleReporter

    found = {}
    reading = Reading(convert("exif", exif or "auto", Exif), bool(clip_boxes))
    opened, refused = open_splits(root)
    with ConsoleReporter() as reporter:
        for split, error in refused.items():
            found[split] = missing_report(root, split, error)
            reporter.message(f"{split}: not checked")
            reporter.message(f"  fault: {found[split].faults[0].kind}: {found[split].faults[0].message}")
        for split, dataset in opened.items():
            reporter.stage(f"check {split}", dataset.num_images)
            seen = 0

            def moved(done: int, total: int) -> None:
                nonlocal seen
                reporter.advance(done - seen)
                seen = done

            report = check_dataset(dataset, progress=moved, reading=reading, trains=split == "train")
            if split == "val" and "train" in opened:
                fault = category_fault(opened["train"], dataset)
                both = [*shared_pictures(found["train"], report), *class_warnings(opened["train"], dataset)]
                report = replace(
                    report, faults=(*([fault] if fault else []), *report.faults), warnings=(*both, *report.warnings)
                )
            reporter.message(
                f"{split}: {report.num_images} images ({report.num_empty} without boxes), {report.num_boxes} boxes, "
                f"{report.num_crowd} crowd"
            )
            for fault in report.faults:
                reporter.message(f"  fault: {fault.kind}: {fault.where}: {fault.message}")
            for warned in report.warnings:
                reporter.message(f"  warning: {warned}")
            found[split] = report
    if json:
        print_json(
            {
                split: {
                    "images": r.num_images, "empty": r.num_empty, "boxes": r.num_boxes, "crowd": r.num_crowd,
                    "faults": [{"kind": x.kind, "where": x.where, "message": x.message} for x in r.faults],
                    "warnings": [{"kind": w.kind, "count": w.count, "examples": list(w.examples)} for w in r.warnings],
                }
                for split, r in found.items()
            }
        )  # fmt: skip
    return 3 if any(r.faults for r in found.values()) else 0
