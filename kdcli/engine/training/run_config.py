"""From flags, ``--config`` and ``--set`` to the options of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcli.data.views import format_views, parse_views
from kdcli.detectors.build import default_keys, parse_model_name
from kdcli.errors import OptionError, UsageError
from kdcli.methods.resolve import absolute_methods, find_methods, require_known, require_table, resolve_all
from kdcli.options import TrainOptions, build, layer
from kdcli.store.storage.resolve import absolute
from kdcli.structures import Canvas

BACKBONE_WORDS = ("none", "imagenet")

PATH_FIELDS = ("data", "teacher", "init_from")
CONTENT_FIELDS = ("data", "teacher", "cache")  # known by their contents
FREE_FIELDS = ("gradient_limit", "workers")  # decide nothing of what is computed: a resumed run may change them


def absolute_weights(weights: str) -> str:
    """``--backbone-weights`` with a path made absolute."""
    return weights if weights in BACKBONE_WORDS else str(Path(weights).resolve())


def absolute_path(path: str | None) -> str | None:
    """config.toml runs again from any folder."""
    return None if path is None else str(Path(path).resolve())


@dataclass(frozen=True)
class RunRequest:
    """What the user asked for: plain fields over the defaults."""

    command: str
    fields: Mapping[str, Any]

    def options(self) -> TrainOptions:
        """The options, unresolved. Raises OptionError for what is unknown or missing."""
        options = build(TrainOptions, {**self.fields, "command": self.command})
        if not options.data:
            raise UsageError("--data is missing: name the data set folder")
        distilling = [n for n in ("method", "cache", "teacher") if getattr(options, n)]
        if self.command == "train" and distilling:
            raise OptionError(
                f"train reads no {', '.join(distilling)}: it trains plainly; use distill, or leave them out"
            )
        if self.command == "distill" and not options.method:
            raise UsageError("--method is missing: name one or more of `kdcli methods`, e.g. --method ld")
        require_known(options.methods, find_methods(options.method) if options.method else {})
        return options


def from_flags(
    command: str, fields: Mapping[str, Any], given: Mapping[str, Any], model: str | None,
    tables: Mapping[str, Mapping[str, Any]],
) -> RunRequest:  # fmt: skip
    """Merge a config file's ``fields``, flags and ``--set`` tables, later ones winning."""
    if fields.get("command", command) != command:
        raise OptionError(f"the config file is for `kdcli {fields['command']}`, not for `kdcli {command}`")
    merged = layer(fields, given, {"model": {"name": model}} if model else {})
    known = find_methods(str(merged["method"])) if merged.get("method") else {}
    for table, values in tables.items():
        require_table(table, [*known, "model", "optim", "train"])
        if table in known:
            merged = layer(merged, {"methods": {table: values}})
        elif table in ("model", "optim"):
            merged = layer(merged, {table: values})
        else:
            if values.get("command", command) != command:
                raise OptionError(f"--set train.command: this is `kdcli {command}`; leave it out")
            merged = layer(merged, values)
    return RunRequest(command, merged)


def resolved_fields(fields: Mapping[str, Any], stored: TrainOptions) -> dict[str, Any]:
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
    given = resolved.get("methods", {})
    known = {name: m for name, m in (find_methods(stored.method) if stored.method else {}).items() if name in given}
    for name, read in resolve_all(known, default_keys(parse_model_name(stored.model.name)[0]), given).items():
        # TOML has no null: an option that is None is not in config.toml
        kept = {k: read[k] for k in given[name] if read[k] is not None}
        resolved["methods"] = {**resolved["methods"], name: kept}
    if resolved.get("model", {}).get("bn") == "auto":
        resolved["model"] = {**resolved["model"], "bn": stored.model.bn}
    if resolved.get("optim", {}).get("lr", 0) in (None, "none"):
        resolved["optim"] = {**resolved["optim"], "lr": stored.optim.lr}
    return resolved
