"""``kdcli train`` and ``kdcli distill``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcli.cli import flags as f
from kdcli.cli.app import app
from kdcli.errors import OptionError, UsageError, pluralize
from kdcli.limits import MAX_RUNS, MAX_SEED
from kdcli.shown import shown


@app.command()
def train(
    data: f.Data = None, model: f.ModelName = None, canvas: f.CanvasSize = None, epochs: f.Epochs = None,
    seed: f.Seed = None, seeds: f.Seeds = None, batch: f.BatchSize = None, views: f.Views = None,
    backbone_weights: f.BackboneWeights = None, init_from: f.InitFrom = None, device: f.Device = None,
    amp: f.Amp = None, workers: f.Workers = None, threads: f.Threads = None, eval_every: f.EvalEvery = None,
    skip_bad: f.SkipBad = None, clip_boxes: f.ClipBoxes = None, exif: f.Exif = None,
    deterministic: f.Deterministic = None, config: f.Config = None, set_: f.Set = None,
    out: f.OutRun = None, resume: f.Resume = None, overwrite: f.Overwrite = False, json: f.Json = False,
) -> int:  # fmt: skip
    """Train a detector without distillation: a teacher, or a student's baseline.

    Example: kdcli train --data DATA --model gfl_resnet18 --canvas 320 --epochs 12 --out runs/teacher
    """
    given = f.collect(
        data=data, canvas=canvas, epochs=epochs, seed=seed, batch=batch, views=views, backbone_weights=backbone_weights,
        init_from=init_from, device=device, amp=amp, workers=workers, threads=threads, eval_every=eval_every,
        skip_bad=skip_bad, clip_boxes=clip_boxes, exif=exif, deterministic=deterministic,
    )  # fmt: skip
    return _launch("train", given, model, config, set_, seeds, out, resume, overwrite, json)


@app.command()
def distill(
    data: f.Data = None,
    cache: Annotated[str | None, typer.Option(help="The store that cache-teacher wrote.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Instead of --cache: run folder or checkpoint, kept live.")] = None,
    method: f.MethodList = None, model: f.ModelName = None, canvas: f.CanvasSize = None, epochs: f.Epochs = None,
    seed: f.Seed = None, seeds: f.Seeds = None, batch: f.BatchSize = None, views: f.Views = None,
    backbone_weights: f.BackboneWeights = None, init_from: f.InitFrom = None, device: f.Device = None,
    amp: f.Amp = None, workers: f.Workers = None, threads: f.Threads = None, eval_every: f.EvalEvery = None,
    shuffle: f.Shuffle = None, gradient_limit: f.GradientLimit = None, skip_bad: f.SkipBad = None,
    clip_boxes: f.ClipBoxes = None, exif: f.Exif = None, deterministic: f.Deterministic = None,
    config: f.Config = None, set_: f.Set = None, out: f.OutRun = None, resume: f.Resume = None,
    overwrite: f.Overwrite = False, json: f.Json = False,
) -> int:  # fmt: skip
    """Train a student with a teacher's stored (--cache) or live (--teacher) tensors.

    Example: kdcli distill --data DATA --cache STORE --method ld,pfi --model gfl_shufflenet_v2_x0_5 --out runs/ld-pfi
    """
    given = f.collect(
        data=data, cache=cache, teacher=teacher, method=method, canvas=canvas, epochs=epochs, seed=seed, batch=batch,
        views=views, backbone_weights=backbone_weights, init_from=init_from, device=device, amp=amp, workers=workers,
        threads=threads, eval_every=eval_every, shuffle=shuffle, gradient_limit=gradient_limit, skip_bad=skip_bad,
        clip_boxes=clip_boxes, exif=exif, deterministic=deterministic,
    )  # fmt: skip
    return _launch("distill", given, model, config, set_, seeds, out, resume, overwrite, json)


def _launch(
    command: str, given: dict[str, Any], model: str | None, config: Path | None, assignments: list[str] | None,
    seeds: str | None, out: Path | None, resume: Path | None, overwrite: bool, as_json: bool,
) -> int:  # fmt: skip
    from kdcli.cli.json_output import print_json
    from kdcli.engine.runtime import distributed
    from kdcli.engine.runtime.stopping import stop_is_an_error
    from kdcli.engine.training import launch, run_config, run_folder
    from kdcli.options import parse_assignments
    from kdcli.report.progress import reporting
    from kdcli.report.text import MARK

    fields = run_folder.read_fields(config) if config else {}
    request = run_config.from_flags(command, fields, given, model, parse_assignments(assignments or []))
    with (
        distributed.joined(request.fields.get("device", "auto")) as first,
        stop_is_an_error(),
        reporting(first) as reporter,
        contextlib.redirect_stdout(sys.stderr),  # torch.hub prints what it downloads; stdout is for --json alone
    ):
        if resume:
            if out or seeds is not None or overwrite:
                raise OptionError("--resume RUN continues RUN: it does not go with --out, --seeds or --overwrite")
            finished = [launch.resume(resume, request, reporter)]
        elif out is None:
            raise UsageError(f"--out is missing: name the run folder to make, e.g. --out runs/{command}")
        elif seeds is not None:
            if "seed" in given:
                raise UsageError("--seed and --seeds exclude each other")
            finished = launch.queue(request, _read_seeds(seeds), out, reporter, overwrite=overwrite)
        else:
            finished = [launch.start(request, out, reporter, overwrite=overwrite)]
        if not first:
            return 0
        _draw(finished)
        for run, metrics in [] if as_json else finished:
            ap = "not defined" if metrics["ap"] is None else f"{metrics['ap']:.2f}"
            reporter.message(f"{run}: AP {ap} after {pluralize(metrics['epochs'], 'epoch')}, {metrics['wall_s']:.0f} s")
            for approximation in metrics.get("approximations", ()):  # a run from before this was noted has none
                reporter.message(f"  {MARK} {approximation}")
    if as_json:
        made = [{"run": str(run), **metrics} for run, metrics in finished]
        print_json({"runs": made} if seeds is not None else made[0])
    return 0


def _read_seeds(text: str) -> list[int]:
    parts = text.split(",")
    if len(parts) > MAX_RUNS:
        raise OptionError(f"--seeds names {len(parts):,} seeds: at most {MAX_RUNS:,} runs at a time")
    try:
        seeds = [int(part) for part in parts]
    except ValueError as error:
        raise OptionError(f"--seeds {shown(text)}: write whole numbers, e.g. 0,1,2") from error
    if not 0 <= min(seeds) <= max(seeds) <= MAX_SEED:
        raise OptionError(f"--seeds {shown(text)}: a seed is from 0 to {MAX_SEED:,}")
    if len(set(seeds)) != len(seeds):
        raise OptionError(f"--seeds {shown(text)} names a seed twice")
    return seeds


def _draw(finished: list[tuple[Path, dict[str, Any]]]) -> None:
    from kdcli.report.plots import plot_run
    from kdcli.report.runs import load_run

    for run, _ in finished:
        plot_run(load_run(run), run / "plots" / "training.png")
