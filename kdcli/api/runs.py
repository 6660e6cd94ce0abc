"""Training runs: the same as ``kdcli train`` and ``kdcli distill``, silent, with errors instead of exit codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from kdcli.api.arguments import method_list
from kdcli.api.reporter import Progress, reporter_of
from kdcli.engine.runtime import distributed
from kdcli.engine.training import launch
from kdcli.engine.training.run_config import from_flags
from kdcli.errors import OptionError, UsageError
from kdcli.report.plots import plot_run
from kdcli.report.runs import load_run


class RunSettings(TypedDict, total=False):
    """Fields of ``config.toml``, with its defaults (docs/training.md, docs/cli.md). A str may be a Path."""

    data: str | Path
    model: str | Mapping[str, Any]  # a name such as gfl_resnet18, or a table [model]
    canvas: str
    epochs: int
    seed: int
    batch: int
    views: str
    backbone_weights: str | Path
    init_from: str | Path | None
    device: str
    amp: Literal["auto", "fp32", "bf16", "fp16"]
    channels_last: bool
    workers: int | None
    threads: int | None
    eval_every: int
    save_steps: int
    skip_bad: bool
    skip_empty: bool
    clip_boxes: bool
    exif: Literal["auto", "apply", "ignore"]
    deterministic: bool
    optim: Mapping[str, Any]  # table [optim]
    rules: int  # the edition that numbers of a config.toml are meant under (docs/training.md)


class DistillSettings(RunSettings, total=False):
    """What ``distill`` takes beside them."""

    shuffle: Literal["full", "shards"]
    gradient_limit: float
    method: str | Sequence[str]  # 'ld,pfi' or ['ld', 'pfi']
    cache: str | Path | None
    teacher: str | Path | None
    micro_batch: int
    teacher_precision: Literal["fp32", "bf16"]
    methods: Mapping[str, Mapping[str, Any]]  # tables [methods.ld], ...: what --set ld.temperature=8 says


def train(
    *, out: Path | str | None = None, resume: Path | str | None = None, overwrite: bool = False, progress: Progress = None,
    **settings: Unpack[RunSettings],
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """Train a detector without distillation, as ``kdcli train`` does; returns the run folder and its final metrics.

    ``out``: the run folder to make; or ``resume``: the one to go on with. ``progress``: True for a bar on stderr, or a
    reporter. ``settings``: fields of ``config.toml``, e.g. ``train(data="DATA", model="gfl_resnet18", epochs=12, out="RUN")``.
    Data workers are started by fork, unless torch is told otherwise. Raises KDError, as the command.
    """
    return _launch("train", settings, out, resume, overwrite, progress)


def distill(
    *, out: Path | str | None = None, resume: Path | str | None = None, overwrite: bool = False, progress: Progress = None,
    **settings: Unpack[DistillSettings],
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """Train a student with a teacher's stored or live tensors, as ``kdcli distill`` does: see ``train``.

    ``distill(data="DATA", cache="STORE", method="ld,pfi", model="gfl_resnet18", out="RUN")``; ``methods`` holds the options
    of each. Raises KDError, as the command.
    """
    return _launch("distill", settings, out, resume, overwrite, progress)


def _launch(
    command: str, settings: Mapping[str, Any], out: Path | str | None, resume: Path | str | None, overwrite: bool,
    progress: Progress,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    fields = plain(settings)
    if isinstance(fields.get("model"), str):
        fields["model"] = {"name": fields["model"]}
    asked = from_flags(command, fields, {}, None, {})
    with distributed.joined(str(asked.fields.get("device", "auto"))) as first, reporter_of(progress, first) as reporter:
        if resume is not None:
            if out is not None or overwrite:
                raise OptionError("resume=RUN continues RUN: it does not go with out= or overwrite=")
            run, metrics = launch.resume(Path(resume), asked, reporter)
        elif out is None:
            raise UsageError(f"out= is missing: name the run folder to make, e.g. out='runs/{command}'")
        else:
            run, metrics = launch.start(asked, Path(out), reporter, overwrite=overwrite)
        if first:
            plot_run(load_run(run), run / "plots" / "training.png")
    return run, metrics


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a TOML file would give them: paths and lists of methods as text. Raises OptionError for no such list."""
    fields = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    return {**fields, "method": method_list(fields["method"])} if "method" in fields else fields
