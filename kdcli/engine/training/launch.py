"""Starts, resumes and queues runs: from fields to a finished run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdcli.data.views import format_views, parse_views
from kdcli.detectors.build import lineage_of, parse_model_name
from kdcli.engine.runtime import distributed
from kdcli.engine.runtime.device import reset_peak_memory
from kdcli.engine.runtime.progress import Watcher
from kdcli.engine.training import run_folder
from kdcli.engine.training.setup import Prepared, absolute_methods, absolute_weights, prepare
from kdcli.engine.training.trainer import Trainer
from kdcli.errors import OptionError, UsageError, nearest
from kdcli.methods import find_methods
from kdcli.methods.base import resolve_options
from kdcli.options import TrainOptions, build, layer, to_plain
from kdcli.store.storage.local import absolute
from kdcli.structures import Canvas

PATH_FIELDS = ("data", "teacher", "init_from")
PLACES = ("data", "teacher", "cache")  # known by their contents


@dataclass(frozen=True)
class Asked:
    """What the user asked for: plain fields over the defaults."""

    command: str
    fields: Mapping[str, Any]

    def options(self) -> TrainOptions:
        """The options, unresolved. Raises OptionError for what is unknown or missing."""
        options = build(TrainOptions, {**self.fields, "command": self.command})
        if not options.data:
            raise UsageError("--data is missing: name the data set folder")
        if self.command == "distill" and not options.method:
            raise UsageError("--method is missing: name one or more of `kdcli methods`, e.g. --method ld")
        require_known(options.methods, options.method)
        return options


def from_flags(
    command: str, fields: Mapping[str, Any], given: Mapping[str, Any], model: str | None,
    tables: Mapping[str, Mapping[str, Any]],
) -> Asked:  # fmt: skip
    """Merge a config file's ``fields``, flags and ``--set`` tables, later ones winning."""
    if fields.get("command", command) != command:
        raise OptionError(f"the config file is for `kdcli {fields['command']}`, not for `kdcli {command}`")
    merged = layer(fields, given, {"model": {"name": model}} if model else {})
    known = find_methods(str(merged["method"])) if merged.get("method") else {}
    for table, values in tables.items():
        if table in known:
            merged = layer(merged, {"methods": {table: values}})
        elif table in ("model", "optim"):
            merged = layer(merged, {table: values})
        elif table == "train":
            merged = layer(merged, values)
        else:
            choices = [*known, "model", "optim", "train"]
            raise OptionError(f"--set {table}.…: unknown table '{table}'{nearest(table, choices)}")
    return Asked(command, merged)


def require_known(tables: Mapping[str, object], methods: str) -> None:
    """Raises OptionError for a table of a method that is not in the comma list ``methods``: it would do nothing."""
    known = find_methods(methods) if methods else {}
    for table in tables:
        if table not in known:
            there = f"--method names {', '.join(known)}" if known else "there is no --method"
            raise OptionError(f"[methods.{table}] is not used: {there}{nearest(table, known)}")


def start(asked: Asked, out: Path, watcher: Watcher, *, overwrite: bool) -> tuple[Path, dict[str, Any]]:
    """A new run in ``out``. Everything is checked before the folder is made."""
    if distributed.is_main():
        run_folder.require_free(out, overwrite=overwrite)
    prepared = prepare(asked.options(), frozenset(asked.fields), watcher)
    if distributed.is_main():
        run_folder.create_run(out, prepared.options, _environment(prepared), overwrite=overwrite)
    reset_peak_memory(prepared.device)
    return out, Trainer(prepared, out, watcher).fit()


def resume(run: Path, asked: Asked, watcher: Watcher) -> tuple[Path, dict[str, Any]]:
    """Continue ``run``; a finished one just gives its metrics. Raises OptionError when a setting would change.

    Data set, store and teacher may have moved: what is in them is compared, not where they are.
    """
    stored = began = run_folder.read_config(run)
    if stored.command != asked.command:
        raise OptionError(f"'{run}' is a {stored.command} run: resume it with `kdcli {stored.command} --resume {run}`")
    fields = _resolved(asked.fields, stored)
    moved = {name: fields[name] for name in PLACES if fields.get(name) and getattr(began, name)}
    stored = build(TrainOptions, layer(to_plain(began), moved))
    run_folder.refuse_changes(run, stored, build(TrainOptions, layer(to_plain(stored), fields)))
    metrics = run_folder.read_metrics(run)
    if metrics is not None:
        watcher.note(f"{run} is finished")
        return run, metrics
    prepared = prepare(stored, frozenset(to_plain(stored)), watcher)
    before, now = run_folder.read_env(run), _environment(prepared)
    changed = [k for k in ("data_sha256", "store", "teacher_sha256") if before.get(k) != now.get(k)]
    if changed:
        raise OptionError(f"--resume {run}: {', '.join(changed)} changed since the run began; start a new run")
    if stored != began and distributed.is_main():
        run_folder.write_config(run, stored)
    reset_peak_memory(prepared.device)
    return run, Trainer(prepared, run, watcher).fit()


def queue(
    asked: Asked, seeds: list[int], out: Path, watcher: Watcher, *, overwrite: bool
) -> list[tuple[Path, dict[str, Any]]]:
    """One run a seed in ``out/seed-N``; finished ones are kept, unfinished ones resumed, the others started."""
    if (out / "config.toml").exists():
        raise OptionError(f"--seeds makes runs in '{out}', which is a run itself; choose another --out")
    finished = []
    for seed in seeds:
        mine = replace(asked, fields={**asked.fields, "seed": seed})
        run = out / f"seed-{seed}"
        watcher.note(f"seed {seed}: {run}")
        if distributed.from_main((run / "config.toml").is_file()) and not overwrite:
            finished.append(resume(run, mine, watcher))
        else:
            finished.append(start(mine, run, watcher, overwrite=overwrite))
    return finished


def _resolved(fields: Mapping[str, Any], stored: TrainOptions) -> dict[str, Any]:
    """The fields as ``prepare`` writes them to config.toml, so that the same flags compare equal."""
    ways: dict[str, Callable[[str], str]] = {
        **dict.fromkeys(PATH_FIELDS, lambda v: str(Path(v).resolve())),
        "cache": absolute,
        "backbone_weights": absolute_weights,
        "method": absolute_methods,
        "canvas": lambda v: str(Canvas.parse(v)),
        "views": lambda v: format_views(parse_views(v)),
    }
    resolved: dict[str, Any] = {n: ways[n](value) if n in ways else value for n, value in fields.items()}
    known = find_methods(stored.method) if stored.method else {}
    for name in set(known) & set(resolved.get("methods", {})):
        given = resolved["methods"][name]
        read = resolve_options(name, known[name], lineage_of(parse_model_name(stored.model.name)[0]), given)
        # TOML has no null: an option that is None is not in config.toml
        kept = {k: read[k] for k in given if read[k] is not None}
        resolved["methods"] = {**resolved["methods"], name: kept}
    if resolved.get("model", {}).get("bn") == "auto":
        resolved["model"] = {**resolved["model"], "bn": stored.model.bn}
    return resolved


def _environment(prepared: Prepared) -> dict[str, Any]:
    data = prepared.train.annotations.sha256 + prepared.val.annotations.sha256
    return run_folder.environment(
        prepared.options,
        data_sha256=hashlib.sha256(data.encode()).hexdigest(),
        store=prepared.teacher and prepared.teacher.store_hash,
        teacher_sha256=prepared.teacher and prepared.teacher.sha256,
        teacher=prepared.options.teacher,
    )
