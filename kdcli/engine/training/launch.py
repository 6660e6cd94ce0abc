"""Starts, resumes and queues runs: from fields to a finished run folder."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdcli.engine.runtime import distributed
from kdcli.engine.runtime.memory import reset_peak_memory
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.engine.training import run_folder
from kdcli.engine.training.old_runs import refuse_resume
from kdcli.engine.training.run_config import CONTENT_FIELDS, FREE_FIELDS, RunRequest, resolved_fields
from kdcli.engine.training.setup import RunSetup, prepare
from kdcli.engine.training.trainer import Trainer
from kdcli.errors import OptionError
from kdcli.options import RULES, TrainOptions, build, layer, to_plain


def start(
    request: RunRequest, out: Path, reporter: ProgressReporter, *, overwrite: bool
) -> tuple[Path, dict[str, Any]]:
    """A new run in ``out``. Everything is checked before the folder is made."""
    if distributed.is_main():
        run_folder.require_free(out, overwrite=overwrite)
    setup = prepare(request.options(), frozenset(request.fields), reporter)
    if distributed.is_main():
        run_folder.create_run(out, setup.options, _environment(setup), overwrite=overwrite)
    reset_peak_memory(setup.device)
    with _held(out):
        return out, Trainer(setup, out, reporter).fit()


def resume(run: Path, request: RunRequest, reporter: ProgressReporter) -> tuple[Path, dict[str, Any]]:
    """Continue ``run``; a finished one just gives its metrics. Raises OptionError when a setting would change.

    Data set, store and teacher may have moved: what is in them is compared, not where they are. The limit of a term's first
    gradient may change: a run that it stopped goes on with another. A run of an earlier edition of the rules keeps its own.
    """
    stored = began = run_folder.read_config(run)
    if stored.command != request.command:
        raise OptionError(f"'{run}' is a {stored.command} run: resume it with `kdcli {stored.command} --resume {run}`")
    metrics = run_folder.read_metrics(run)
    before = run_folder.read_env(run) if metrics is None else None  # damage is named before what follows from it
    if distributed.is_main():
        run_folder.remove_creation_lock(run)
    fields = resolved_fields(request.fields, stored)
    moved = {name: fields[name] for name in CONTENT_FIELDS if fields.get(name) and getattr(began, name)}
    free = {name: fields[name] for name in FREE_FIELDS if name in fields}
    stored = build(TrainOptions, layer(to_plain(began), moved, free))
    run_folder.refuse_changes(run, stored, build(TrainOptions, layer(to_plain(stored), fields)))
    if metrics is not None:
        reporter.message(f"{run} is finished")
        if distributed.is_main():
            run_folder.tidy_finished(run)
        return run, metrics
    assert before is not None
    refuse_resume(run, stored)
    setup = prepare(stored, frozenset(to_plain(stored)), reporter)
    now = _environment(setup)
    changed = [k for k in ("data_sha256", "store", "teacher_sha256") if before.get(k) != now.get(k)]
    if changed:
        raise OptionError(f"--resume {run}: {', '.join(changed)} changed since the run began; start a new run")
    reset_peak_memory(setup.device)
    with _held(run):
        if stored != began and distributed.is_main():
            run_folder.change_config(run, {**moved, **free})
        return run, Trainer(setup, run, reporter).fit()


def _held(run: Path) -> AbstractContextManager[bool | None]:
    """The run folder for this training alone: its main process holds it."""
    return run_folder.lock_run(run) if distributed.is_main() else nullcontext()


def queue(
    request: RunRequest, seeds: list[int], out: Path, reporter: ProgressReporter, *, overwrite: bool
) -> list[tuple[Path, dict[str, Any]]]:
    """One run a seed in ``out/seed-N``; finished ones are kept, unfinished ones resumed, the others started."""
    if (out / "config.toml").exists():
        raise OptionError(f"--seeds makes runs in '{out}', which is a run itself; choose another --out")
    finished = []
    for seed in seeds:
        mine = replace(request, fields={**request.fields, "seed": seed})
        run = out / f"seed-{seed}"
        reporter.message(f"seed {seed}: {run}")
        if distributed.from_main((run / "config.toml").is_file()) and not overwrite:
            finished.append(resume(run, mine, reporter))
        else:
            earlier = [str(done) for done, _ in finished if run_folder.read_config(done).rules < RULES]
            if earlier:
                reporter.message(
                    f"warning: {run} begins under today's rules, {earlier[0]} began under earlier ones: `kdcli compare` shows "
                    "them apart; for one group of seeds choose another --out"
                )
            finished.append(start(mine, run, reporter, overwrite=overwrite))
    return finished


def _environment(setup: RunSetup) -> dict[str, Any]:
    data = setup.train.annotations.sha256 + setup.val.annotations.sha256
    # pixels or boxes that a run without these would not have; nothing for most, whose hash stays what it was
    data += "".join(f"{s.split} {s.reading()}" for s in (setup.train, setup.val) if s.reading())
    return run_folder.environment(
        setup.options,
        data_sha256=hashlib.sha256(data.encode()).hexdigest(),
        store=setup.teacher and setup.teacher.store_hash,
        teacher_sha256=setup.teacher and setup.teacher.sha256,
        teacher=setup.options.teacher,
    )
