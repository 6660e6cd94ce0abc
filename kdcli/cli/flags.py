"""Flags that several commands share, as annotated types; None means that the user did not set it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kdcli.limits import MAX_BATCH, MAX_EPOCHS, MAX_THREADS, MAX_WORKERS

Data = Annotated[str | None, typer.Option(help="Data set folder in COCO layout.")]
ModelName = Annotated[str | None, typer.Option("--model", help="<detector>_<backbone>, e.g. gfl_resnet18.")]
CanvasSize = Annotated[str | None, typer.Option("--canvas", help="Image size: 320, or HEIGHTxWIDTH, e.g. 800x1344.")]
Epochs = Annotated[int | None, typer.Option(min=1, max=MAX_EPOCHS, help="Epochs (default 12).")]
Seed = Annotated[int | None, typer.Option(help="Random seed (default 0).")]
Seeds = Annotated[str | None, typer.Option(help="Several runs, e.g. 0,1,2: a queue in OUT/seed-N that resumes.")]
BatchSize = Annotated[int | None, typer.Option("--batch", min=1, max=MAX_BATCH, help="Images a step (default 16).")]
Views = Annotated[
    str | None, typer.Option(help="Comma list of identity, hflip, crop-K, scale-K (default identity,hflip).")
]
BackboneWeights = Annotated[str | None, typer.Option(help="none, imagenet (download) or the path of a state dict.")]
InitFrom = Annotated[str | None, typer.Option(help="Start a new run from the weights of this run or checkpoint.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 (default auto).")]
Amp = Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16; auto: bf16 on a GPU, fp32 on a CPU.")]
Workers = Annotated[
    int | None, typer.Option(min=0, max=MAX_WORKERS, help="Data workers (default: spare cores, at most 8).")
]
TeacherWorkers = Annotated[
    int | None,
    typer.Option(
        min=0, max=MAX_WORKERS, help="Data workers (default: none beside a teacher on a CPU, else as in distill)."
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, max=MAX_THREADS, help="CPU threads of the main process.")]
Shuffle = Annotated[str | None, typer.Option(help="full, or shards: for slow disks and object stores (default full).")]
EvalEvery = Annotated[int | None, typer.Option(min=1, max=MAX_EPOCHS, help="Evaluate each N epochs (default 1).")]
SkipBad = Annotated[bool | None, typer.Option("--skip-bad", help="Leave faulty images out, and list them.")]
ClipBoxes = Annotated[
    bool | None, typer.Option("--clip-boxes", help="Clip boxes beyond the border instead of refusing them.")
]
Exif = Annotated[
    str | None,
    typer.Option(help="EXIF orientation: auto, apply or ignore (default auto: what the annotated sizes prove)."),
]
Deterministic = Annotated[bool | None, typer.Option("--deterministic", help="No TF32, deterministic algorithms.")]
GradientLimit = Annotated[
    float | None,
    typer.Option(
        min=0, help="Stop a run whose term has a first gradient over N times detection's (default 100; 0: never)."
    ),
]
Config = Annotated[Path | None, typer.Option(help="TOML file with the same fields; flags win.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="TABLE.KEY=VALUE, e.g. ld.temperature=8; repeatable.")]
OutRun = Annotated[Path | None, typer.Option("--out", help="Run folder to make.")]
Resume = Annotated[Path | None, typer.Option(help="Continue this run folder; nothing may change.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def _named(methods: str | None) -> str | None:
    """The files in what the command line says of methods may be run; those in files may not."""
    if methods and ":" in methods:
        from kdcli.methods.resolve import name_methods

        name_methods(methods)
    return methods


MethodList = Annotated[
    str | None,
    typer.Option("--method", callback=_named, help="Comma list of `kdcli methods`, e.g. ld,pfi, or ./mine.py:Mine."),
]
ReadMethods = Annotated[
    str | None, typer.Option("--method", callback=_named, help="Read what these methods read (default: everything).")
]


def collect(**values: Any) -> dict[str, Any]:
    """The fields that the user set."""
    return {key: value for key, value in values.items() if value is not None}
