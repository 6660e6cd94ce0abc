"""``kdcli eval`` and ``kdcli predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdcli.cli import flags as f
from kdcli.cli.app import app
from kdcli.errors import UsageError, pluralize
from kdcli.limits import MAX_BATCH

Checkpoint = Annotated[str, typer.Argument(help="Run folder or checkpoint file.", show_default=False)]


@app.command(name="eval")
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str | None, typer.Option(help="Data set folder in COCO layout.")] = None,
    split: Annotated[str, typer.Option(help="Split to score.")] = "val",
    canvas: f.CanvasSize = None,
    batch: Annotated[int, typer.Option("--batch", min=1, max=MAX_BATCH, help="Images a forward pass.")] = 8,
    device: f.Device = None, amp: f.Amp = None, workers: f.Workers = None, skip_bad: f.SkipBad = None,
    clip_boxes: f.ClipBoxes = None, exif: f.Exif = None,
    out: Annotated[Path | None, typer.Option(help="Folder for detections.json and metrics.json.")] = None,
    min_ap: Annotated[float | None, typer.Option(help="Exit with 6 below this AP.")] = None,
    json: f.Json = False,
) -> int:  # fmt: skip
    """Score a detector with pycocotools: AP, AP50, AP75, AP_S/M/L, AR, each class, images/s, parameters.

    Example: kdcli eval runs/student --data DATA --out scores
    """
    from kdcli.cli.json_output import print_json
    from kdcli.cli.outputs import require_folder
    from kdcli.engine.evaluation.checkpoint import evaluate_checkpoint, write_scores
    from kdcli.engine.runtime.device import pick_device
    from kdcli.engine.runtime.memory import keep_freed_memory
    from kdcli.report.console import human_console, table_of_metrics
    from kdcli.report.gates import require_ap, require_reachable
    from kdcli.report.progress import ConsoleReporter

    require_reachable(min_ap)
    if data is None:
        raise UsageError("--data is missing: name the data set folder")
    if out is not None:
        require_folder(out, "--out")
    keep_freed_memory(pick_device(device or "auto"))
    with ConsoleReporter() as reporter:
        scores = evaluate_checkpoint(
            checkpoint, data, split=split, canvas=canvas, batch=batch, device=device or "auto", amp=amp or "auto",
            workers=workers, skip_bad=bool(skip_bad), clip_boxes=bool(clip_boxes), exif=exif or "auto",
            reporter=reporter,
        )  # fmt: skip
    if out is not None:
        write_scores(out, scores)
    if json:
        print_json(scores.to_json())
    else:
        more = {"images/s": f"{scores.images_per_s:.1f}", "parameters": f"{scores.parameters:,}"}
        human_console().print(table_of_metrics(scores.metrics, more=more, title=f"{checkpoint} on {split}"))
    require_ap(scores.metrics.ap, min_ap)
    return 0


@app.command()
def predict(
    checkpoint: Checkpoint,
    source: Annotated[Path, typer.Argument(help="Image, or folder of images.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the drawings and detections.json.")],
    score: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw detections from this score.")] = 0.3,
    canvas: f.CanvasSize = None, device: f.Device = None, exif: f.Exif = None, json: f.Json = False,
) -> int:  # fmt: skip
    """Draw detections on images, and write them to detections.json.

    Example: kdcli predict runs/student photos --out drawn --score 0.4
    """
    from kdcli.cli.json_output import print_json
    from kdcli.cli.outputs import require_folder
    from kdcli.detectors.features import require_head
    from kdcli.detectors.weights import load_detector
    from kdcli.engine.evaluation.predict import image_files, predict_files, require_images
    from kdcli.engine.runtime.device import pick_device
    from kdcli.engine.runtime.memory import keep_freed_memory
    from kdcli.options import Exif, convert
    from kdcli.report.draw import draw_detections, save_png
    from kdcli.report.progress import ConsoleReporter
    from kdcli.structures import Canvas

    require_folder(out, "--out")
    detector, meta = load_detector(checkpoint)
    require_head(detector, f"checkpoint '{meta.path}'")
    target, chosen = Canvas.parse(canvas or meta.canvas), pick_device(device or "auto")
    keep_freed_memory(chosen)
    names = meta.classes.names
    turned = convert("exif", exif or "auto", Exif) != "ignore"
    files, left_out = image_files(source)
    several = require_images(files, turned)
    stems = [file.stem for file in files]  # a.jpg and a.png must not draw over each other
    out.mkdir(parents=True, exist_ok=True)
    drawn = []
    with ConsoleReporter() as reporter:
        reporter.stage("predict", len(files))
        for found in predict_files(detector, files, target, chosen, meta.classes, out / "detections.json", turned):
            keep = found.scores >= score
            labels = [names[k] for k in found.labels[keep]]
            picture = draw_detections(found.pixels, found.boxes[keep], labels, found.scores[keep], classes=names)
            name = out / f"{found.file.stem if stems.count(found.file.stem) == 1 else found.file.name}.png"
            save_png(picture, name)
            drawn.append({"image": str(found.file), "drawn": str(name), "detections": int(keep.sum())})
            reporter.advance(1)
        if left_out:
            reporter.message(f"left out {pluralize(left_out, 'name')} in {source}: hidden, or no file")
        if several:
            reporter.message(f"{pluralize(several, 'image')} of several frames or pages: the first was taken")
        reporter.message(f"{pluralize(len(drawn), 'drawing')} and detections.json in {out}")
    if json:
        print_json({"images": drawn})
    return 0
