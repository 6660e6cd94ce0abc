"""What each method is on each detector: whether it works there, what it stores, with which weights."""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping
from typing import Any, Literal

from kdcli.detectors.base import Detector
from kdcli.detectors.build import DETECTORS, ModelSpec, build_detector
from kdcli.engine.caching.row_sizes import missing, row_bytes, specs_at
from kdcli.engine.teacher.specs import region_spec
from kdcli.methods import METHODS
from kdcli.methods.base import Method, method_options
from kdcli.methods.resolve import FACTORS, resolve_options
from kdcli.structures import Canvas
from kdcli.tensors import BACKBONE, BOX_DISTRIBUTION, BOX_REGRESSION, TensorSpec


def method_rows(canvas: Canvas, classes: int) -> list[dict[str, Any]]:
    """Each method, with an entry for each detector.

    The keys of an entry are those of ``kdcli methods --json``; ``bytes``: of an image in one view, before compression.
    """
    return [
        {
            "method": name,
            "title": method.title,
            "evidence": method.evidence,
            "offline": method.offline,
            "options": {o: p.default for o, p in method_options(method).items()},
            "detectors": {d: _on_detector(name, method, d, canvas, classes) for d in DETECTORS},
        }
        for name, method in METHODS.items()
    ]


def _on_detector(name: str, method: type[Method], detector: str, canvas: Canvas, classes: int) -> dict[str, Any]:
    """What ``method`` is on ``detector``: ``missing`` is empty where it works; ``set``: the --set that it takes."""
    options = resolve_options(name, method, detector, {})
    needs = method.reads(options)
    model, choice = _small(detector), ""
    lacking = missing(needs, model.specs())
    if lacking == [BOX_DISTRIBUTION] and BOX_REGRESSION in model.specs():
        model, choice, lacking = _small(detector, box="distribution"), "model.box=distribution", []
    if lacking:
        return {"missing": lacking}
    regions = region_spec(model.region_defaults, {name: method}, {name: options})
    sizes = row_bytes(model, specs_at(model, classes), needs, regions, canvas)
    plain = {o: p.default for o, p in method_options(method).items()}
    weights = {o: v for o, v in options.items() if is_factor(o, v)}
    return {
        "missing": [],
        "set": choice,
        "needs": [n.key for n in needs],
        "weights": weights,
        "other_defaults": {o: v for o, v in options.items() if v != plain[o] and o not in weights},
        "bytes": sum(sizes.values()),
        "bytes_by_array": sizes,
        "options": _other_needs(name, method, options, model, canvas, classes),
    }


def _other_needs(
    name: str, method: type[Method], options: Mapping[str, Any], model: Detector, canvas: Canvas, classes: int
) -> list[dict[str, Any]]:
    """The single options that make ``method`` read more of a teacher than its defaults do, where ``model`` gives that.

    ``set``: the --set of each option that does the same; ``adds``: the needs on top; ``bytes``: of the whole row.
    """
    plain = set(method.reads(options))
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for option, value in _switches(method, options):
        chosen = {**options, option: value}
        needs = method.reads(chosen)
        if not set(needs) - plain or missing(needs, model.specs()):
            continue
        adds = [n.key for n in needs if n not in plain]
        assignment = f"{name}.{spelled_options({option: value})}"
        if tuple(adds) in found:
            found[tuple(adds)]["set"].append(assignment)
            continue
        regions = region_spec(model.region_defaults, {name: method}, {name: chosen})
        sizes = row_bytes(model, _resnet50(specs_at(model, classes)), needs, regions, canvas)
        found[tuple(adds)] = {"set": [assignment], "adds": adds, "bytes": sum(sizes.values())}
    return list(found.values())


def _resnet50(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """``specs`` with the stages of a ResNet-50, which 101 and 152 share, in the place of a small backbone's."""
    channels = dict(zip(BACKBONE, (256, 512, 1024, 2048), strict=True))
    return {name: TensorSpec(s.per, (channels[name],)) if name in channels else s for name, s in specs.items()}


def _switches(method: type[Method], options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Other values of the options that may switch a part on: each other word of a choice, 1 for a factor that is 0."""
    hints = typing.get_type_hints(method.__init__)
    found = []
    for option, value in options.items():
        hint = hints.get(option)
        if typing.get_origin(hint) is Literal:
            found += [(option, word) for word in typing.get_args(hint) if word != value]
        elif isinstance(value, bool):
            found.append((option, not value))
        elif is_factor(option, value) and not value:
            found.append((option, 1.0))
    return found


def is_factor(option: str, value: object) -> bool:
    """Whether an option is a factor of a term."""
    return isinstance(value, float) and (option.endswith("weight") or option in FACTORS)


@functools.cache
def _small(detector: str, box: Literal["default", "distribution"] = "default") -> Detector:
    """A detector of few weights: its grid, assigner and tensors are those of any size."""
    return build_detector(ModelSpec(detector, "shufflenet_v2_x0_5", 2, 32, 1, head_channels=32, box=box))


def spelled_options(options: Mapping[str, Any]) -> str:
    """``weight=4, form=squared``."""
    return ", ".join(f"{o}={f'{v:g}' if isinstance(v, float) else str(v).lower()}" for o, v in options.items())
