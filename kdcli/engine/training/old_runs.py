"""What a changed default or rule means for a run that began before it, and for its config.toml where that runs again.

``TrainOptions.rules`` says which edition of the rules the numbers of a config.toml are meant under. A file without it is of
edition 1. Edition 2: PFI sums over a cell's outputs where it took their mean; FGD on Faster R-CNN reads four levels of five;
``mm_faster_rcnn`` trains as mmdet does; ``model.bn=auto`` is ``norm_eval`` on pretrained weights where it was ``frozen``;
BCKD's weights off GFL are others. A run that goes on keeps its own where its numbers can say so, and is refused where not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdcli.detectors.base import Detector
from kdcli.detectors.build import default_keys, family_of, parse_model_name
from kdcli.engine.runtime.progress import ProgressReporter
from kdcli.errors import OptionError
from kdcli.methods import METHODS
from kdcli.methods.resolve import resolve_options
from kdcli.options import RULES, TrainOptions

# P_dif of a cell was its sum over A*K; the loss has P_dif in this power: ||P * F||^2, P * F, ||P * F||
PFI_POWERS = {"squared": 2, "linear": 1, "norm": 1}


def refuse_resume(run: Path, options: TrainOptions) -> None:
    """Raises OptionError for an unfinished run of an earlier edition that would go on as another one than it began."""
    for change in _gone(options):
        raise OptionError(
            f"--resume {run}: {change} since this run began, and it would go on as another one; start a new run, or finish "
            "it with the kdcli that began it (env.json)"
        )


def to_today(options: TrainOptions, student: Detector, reporter: ProgressReporter) -> TrainOptions:
    """``options`` in the numbers of today's edition, for the same losses, with a line for each that differs from what today's
    defaults are. ``options`` themselves where they are of today's edition.

    A rule that is gone cannot be kept: a new run from an old config.toml trains under today's, which is said.
    """
    if options.rules == RULES:
        return options
    for change in _gone(options):
        reporter.message(f"{change} since this config.toml was written; the new run trains under today's rules")
    if options.model.bn == "frozen" and options.backbone_weights != "none":
        reporter.message(
            "model.bn = frozen stays, as auto was then: scales and shifts are fixed; auto is now norm_eval"
        )
    methods = {name: dict(values) for name, values in options.methods.items()}
    built_in = _built_in(options)
    if "pfi" in built_in and "weight" in methods.get("pfi", {}):
        _keep_pfi(methods["pfi"], student, reporter)
    if "bckd" in built_in:
        _say_defaults("bckd", ("cls_weight", "loc_weight"), methods.get("bckd", {}), student, reporter)
    return replace(options, rules=RULES, methods=methods)


def _built_in(options: TrainOptions) -> set[str]:
    """The methods of kdcli itself; one from a user's file may have the name of one."""
    return {name.strip() for name in options.method.split(",")} & set(METHODS)


def _gone(options: TrainOptions) -> list[str]:
    """The rules of edition 1 that ``options`` use and that no option brings back."""
    if options.rules == RULES:
        return []
    detector, _ = parse_model_name(options.model.name)
    found = []
    if detector == "mm_faster_rcnn":
        found.append("mm_faster_rcnn's training became mmdet's (box loss, proposals, RPN matching)")
    if "fgd" in _built_in(options) and family_of(detector) == "faster_rcnn":
        found.append("fgd on Faster R-CNN changed (four levels, it was five, each with weights of its own)")
    return found


def _keep_pfi(table: dict[str, Any], student: Detector, reporter: ProgressReporter) -> None:
    outputs = student.grid.num_anchors * student.spec.num_classes
    old = table["weight"]
    table["weight"] = old / outputs ** PFI_POWERS[table.get("form", "squared")]
    reporter.message(
        f"pfi.weight = {old:g} stays the same loss: it was for the mean over a cell's {outputs} outputs, for their sum, as "
        f"now, it is {table['weight']:.4g}"
    )


def _say_defaults(
    name: str, names: tuple[str, ...], table: Mapping[str, Any], student: Detector, reporter: ProgressReporter
) -> None:
    today = resolve_options(name, METHODS[name], default_keys(student.spec.detector), {})
    for option in names:
        if option in table and table[option] != today[option]:
            reporter.message(f"{name}.{option} = {table[option]:g} stays; today's default here is {today[option]:g}")
