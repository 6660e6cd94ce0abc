"""Options of the commands: frozen dataclasses, filled from defaults, a TOML file and flags, in this order.

A run's resolved options are written to its ``config.toml``, which runs again as it is. Unknown keys are errors that
name the nearest known one. ``--set table.key=value`` reaches everything that has no flag of its own.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from kdcli.errors import MissingPathError, OptionError, did_you_mean
from kdcli.limits import INT64, MAX_BATCH, MAX_EPOCHS, MAX_RATE, MAX_ROWS, MAX_SEED, MAX_THREADS, MAX_WORKERS
from kdcli.shown import escaped, shown, word_of
from kdcli.untrusted import parse_toml

T = TypeVar("T")

Exif = Literal["auto", "apply", "ignore"]  # the EXIF orientation of images: auto: what the sizes of a data set prove

RULES = 2  # of training and methods, see kdcli/engine/training/old_runs.py: which edition a new run begins under


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Table ``[model]``: the student's (or teacher's) architecture."""

    name: str = ""  # <detector>_<backbone>, e.g. gfl_resnet18
    fpn_channels: int = 256
    tower_convs: int = 4  # 3x3 convolutions in each of the head's two towers
    head_channels: int | None = None  # None: as many as fpn_channels
    reg_max: int = 16  # bins per edge minus one
    box: Literal["default", "distribution"] = "default"  # distribution: edge logits, which LD needs, on any dense head
    box_loss: Literal["default", "ciou"] = "default"  # ciou: CIoU where the dense head has GIoU
    fcos: Literal["normalised", "plain"] = "normalised"  # fcos only; plain: without the later improvements
    dcn: Literal["none", "v1", "v2"] = "none"  # deformable convolutions in a ResNet's bottlenecks; v2: with a mask
    bn: Literal["auto", "train", "norm_eval", "frozen", "sync"] = "auto"  # auto: train; pretrained: norm_eval


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """Table ``[optim]``."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float | None = None  # for 16 images a step; scaled linearly with the global batch. None: the detector's own
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["step", "cosine"] = "step"
    steps: tuple[int, ...] | None = None  # epochs after which lr is x0.1; None: after 2/3 and 11/12 of them; (): never
    warmup_steps: int | None = None  # None: min(500, 10 % of all steps)
    clip: float = 35.0  # largest gradient norm; 0: no clipping
    ema: bool = False
    ema_decay: float = 0.9998

    def __post_init__(self) -> None:
        _require(self, "lr", lambda v: 0 < v <= MAX_RATE, f"a positive number, at most {MAX_RATE:g}")
        _require(self, "momentum", lambda v: 0 <= v < 1, "at least 0 and below 1")
        _require(self, "ema_decay", lambda v: 0 <= v < 1, "at least 0 and below 1")
        _require(self, "weight_decay", lambda v: 0 <= v <= MAX_RATE, f"at least 0 and at most {MAX_RATE:g}")
        for name in ("warmup_steps", "clip"):  # a negative clip would turn the gradient round
            _require(self, name, lambda v: 0 <= v < math.inf, "at least 0")
        if self.steps is not None:
            if self.schedule != "step":
                raise OptionError(
                    f"steps = {shown(list(self.steps))}: schedule is '{self.schedule}', which has none; leave one out"
                )
            if self.steps != tuple(sorted(set(self.steps))) or min(self.steps, default=1) < 1:
                raise OptionError(
                    f"steps = {shown(list(self.steps))}: must be epochs, ascending, from 1 on, e.g. [8, 11]"
                )


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything that decides what ``train`` and ``distill`` compute."""

    command: Literal["train", "distill"] = "train"
    data: str = ""
    canvas: str = "320"
    epochs: int = 12
    seed: int = 0
    batch: int = 16  # images a step, over all processes
    views: str = "identity,hflip"
    backbone_weights: str = "none"  # none | imagenet | PATH
    init_from: str | None = None
    device: str = "auto"
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: bool = True
    workers: int | None = None  # data workers; None: one per spare core, at most 8
    threads: int | None = None  # CPU threads of the main process; None: PyTorch's choice
    eval_every: int = 1  # epochs
    save_steps: int = 1000  # a resumable state is written every so many steps, and after each epoch
    skip_bad: bool = False
    clip_boxes: bool = False  # clip boxes beyond the border instead of refusing them
    exif: Exif = "auto"
    skip_empty: bool = False  # train on no image without a box to train on, as mmdet does
    deterministic: bool = False
    gradient_limit: float = 100.0  # distill: a term's first gradient over detection's, at most; 0: no limit
    shuffle: Literal["full", "shards"] = "full"  # shards: among the rows of a few shards at a time; needs a store
    method: str = ""  # distill: comma list
    cache: str | None = None  # distill: the store ...
    teacher: str | None = None  # ... or the live teacher
    micro_batch: int = 8  # live teacher: images per forward pass
    teacher_precision: Literal["fp32", "bf16"] = "fp32"
    model: ModelOptions = field(default_factory=ModelOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # options of each method, resolved
    rules: int = RULES  # the edition that these numbers are meant under; a run's config.toml without it is of edition 1

    def __post_init__(self) -> None:
        _require(self, "rules", lambda v: 1 <= v <= RULES, f"from 1 to {RULES}; a newer kdcli wrote more")
        _require_range(self, 1, {"epochs": MAX_EPOCHS, "eval_every": MAX_EPOCHS, "batch": MAX_BATCH})
        _require_range(self, 1, {"save_steps": INT64 - 1, "micro_batch": MAX_BATCH, "threads": MAX_THREADS})
        _require_range(self, 0, {"seed": MAX_SEED, "workers": MAX_WORKERS})
        _require(self, "gradient_limit", lambda v: 0 <= v < math.inf, "at least 0; 0 is no limit")
        if self.optim.steps and self.optim.steps[-1] >= self.epochs:
            raise OptionError(
                f"optim.steps = {shown(list(self.optim.steps))}: a run of {self.epochs} epochs has none to train after epoch "
                f"{self.optim.steps[-1]}; name epochs below {self.epochs}"
            )
        if self.shuffle == "shards" and self.cache is None:
            raise OptionError("shuffle = 'shards': follows the shards of a store; add --cache STORE, or leave it out")


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Everything that decides what ``cache-teacher`` writes."""

    data: str = ""
    teacher: str = ""
    method: str = ""
    split: str = "train"
    canvas: str | None = None  # None: the teacher's own
    views: str = "identity,hflip"
    view_seed: int = 0
    encoding: Literal["default", "compact", "float16", "lossless"] = "default"
    precision: Literal["fp32", "bf16"] = "fp32"
    micro_batch: int = 8
    threads: int | None = None
    device: str = "auto"
    workers: int | None = None  # None: 0 beside a teacher on a CPU, which takes turns with loading and encoding
    shard_rows: int | None = None  # None: as many as fit 128 MB, at most 256
    min_teacher_ap: float = 0.0
    compile: bool = False  # the teacher's forward, by torch.compile: last digits differ
    cache_images: bool = False  # store the canvases too: training then opens no image file
    skip_bad: bool = False
    clip_boxes: bool = False
    exif: Exif = "auto"
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_range(self, 1, {"micro_batch": MAX_BATCH, "shard_rows": MAX_ROWS, "threads": MAX_THREADS})
        _require_range(self, 0, {"view_seed": MAX_SEED, "workers": MAX_WORKERS})
        _require(self, "min_teacher_ap", lambda v: 0 <= v <= 100, "an AP from 0 to 100")


def build(cls: type[T], given: Mapping[str, Any], *, label: str = "") -> T:
    """Make a frozen options dataclass from plain values, with defaults for what is not given.

    Nested dataclasses take mappings. Raises OptionError for an unknown key (with the nearest) or a wrong type.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in hints:
            raise OptionError(f"unknown option '{label}{escaped(key)}'{did_you_mean(key, hints)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            if not isinstance(value, Mapping):
                raise OptionError(f"{label}{key} = {shown(value)}: must be a table")
            values[key] = build(hint, value, label=f"{label}{key}.")
        elif typing.get_origin(hint) is not None and typing.get_origin(hint).__name__ == "Mapping":
            if not isinstance(value, Mapping) or not all(isinstance(v, Mapping) for v in value.values()):
                raise OptionError(f"{label}{key} = {shown(value)}: must be tables, e.g. [{label}{key}.ld]")
            values[key] = value
        else:
            values[key] = convert(f"{label}{key}", value, hint)
    try:
        return cls(**values)
    except OptionError as error:
        raise OptionError(f"{label}{error}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Read a ``--config`` file. Raises MissingPathError or OptionError."""
    if not path.is_file():
        raise MissingPathError(f"config file '{path}' does not exist")
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no TOML, or no UTF-8
        raise OptionError(f"config file '{path}' is not TOML: {error}") from error


def parse_assignments(assignments: list[str]) -> dict[str, dict[str, Any]]:
    """Read ``--set`` flags, ``["ld.temperature=8", "optim.ema=true"]`` -> ``{"ld": {"temperature": 8}, ...}``."""
    tables: dict[str, dict[str, Any]] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        table, dot, key = name.strip().partition(".")
        if not equals or not dot or not table or not key:
            raise OptionError(f"--set '{text}': write TABLE.KEY=VALUE, e.g. --set ld.temperature=8")
        tables.setdefault(table, {})[key] = _literal(value.strip())
    return tables


def layer(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings, later ones winning, tables key by key."""
    merged: dict[str, Any] = {}
    for mapping in layers:
        for key, value in mapping.items():
            if isinstance(value, Mapping):
                below = merged.get(key)
                merged[key] = layer(below if isinstance(below, Mapping) else {}, value)
            else:
                merged[key] = value
    return merged


def to_plain(options: Any) -> dict[str, Any]:
    """A dataclass as nested dicts and lists without None (TOML has no null): the inverse of ``build``."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: clean(v) for k, v in value.items() if v is not None}
        return list(value) if isinstance(value, tuple) else value

    result: dict[str, Any] = clean(dataclasses.asdict(options))
    return result


def _require_range(options: Any, least: int, most: Mapping[str, int]) -> None:
    """Raises OptionError for a field that is set, and less than ``least`` or more than ``most`` says of it."""
    for name, limit in most.items():
        _require(options, name, lambda v: v >= least, f"at least {least}")
        _require(options, name, lambda v, limit=limit: v <= limit, f"at most {limit:,}")  # type: ignore[misc]


def _require(options: Any, name: str, fits: Callable[[float], bool], wanted: str) -> None:
    """Raises OptionError when a field is set and does not fit; nan never does."""
    value = getattr(options, name)
    if value is not None and not fits(value):
        raise OptionError(f"{name} = {shown(value)}: must be {wanted}")


def _literal(text: str) -> Any:
    """A TOML value where it is one (numbers, true/false, quoted text), else the text itself."""
    try:
        found = parse_toml(f"value = {text}")
    except ValueError:
        return text
    return found["value"] if len(found) == 1 else text  # a text of several lines may have more


def convert(label: str, value: Any, hint: Any) -> Any:
    """Read ``value`` (from a flag or a TOML file) as ``hint``: bool, int, float, str, Literal, a tuple of whole numbers, or
    one of them or None.

    Raises OptionError naming ``label``.
    """
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise OptionError(f"{label} = {shown(value)}{did_you_mean(word_of(value), [str(c) for c in choices])}")
        return value
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return convert(label, value, inner[0])
    if origin is tuple and isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
        return tuple(_int64(label, v) for v in value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return _int64(label, value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(_int64(label, value) if isinstance(value, int) else value)
    if hint is str and isinstance(value, str):
        return value
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: f'text, in quotes: "{shown(value)}"'}
    wanted = "whole numbers in brackets, e.g. [8, 11]" if origin is tuple else kinds.get(hint, str(hint))
    raise OptionError(f"{label} = {shown(value)}: must be {wanted}")


def _int64(label: str, value: int) -> int:
    if not -INT64 <= value < INT64:
        raise OptionError(f"{label} = {shown(value)}: does not fit 64 bits")
    return value
