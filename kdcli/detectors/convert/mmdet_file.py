"""What a file of mmdet holds: the weights of one detector, its class names and the text of its config.

mmdet writes ``{"state_dict": ..., "meta": ...}``. The config is text (``meta.cfg`` in 3.x, ``meta.config`` in 2.x): it
is searched, never run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kdcli.detectors.convert.mmdet_backbone import foreign_part
from kdcli.detectors.soundness import require_sound
from kdcli.detectors.state_dicts import weights_in
from kdcli.errors import OptionError

# The EMA hooks of mmcv 1.x and mmdet 2.x keep a second set of weights as flat buffers of the model. Before a checkpoint is
# written, as an epoch ends, they swap the two: the average stands under the plain names, the raw weights are the buffers.
EMA = "ema_* ({count} raw weights of an EMA hook; the plain names hold their average)"
_STEM = re.compile(r"(.*?)backbone\.conv1\.weight")
_BUFFER_OF_GFL = re.compile(r"\bintegral\.project$")  # 0, 1, .., reg_max: the same in every model


@dataclass(frozen=True)
class MmdetFile:
    """weights: under mmdet's names, prefix taken off. names: of the classes, in the order of the outputs; None: not in
    the file. config: its text, empty if there is none. left_out: the prefixes of other weights in the file.
    """

    weights: dict[str, Tensor]
    names: list[str] | None
    config: str
    left_out: tuple[str, ...]


def read_mmdet(content: object, *, prefix: str | None = None) -> MmdetFile:
    """Sort out ``content``, a file as ``files.load_torch`` reads it, or a bare state dict.

    prefix: of the wanted detector's weights, e.g. ``teacher_model``. None: the weights without one, or the student's, or
    the only ones. Raises OptionError when it is no such file or the prefix does not name one detector.
    """
    if not isinstance(content, Mapping):
        raise OptionError("not a file of mmdet: it holds no dictionary; take a checkpoint or a state dict")
    try:
        state, meta = weights_in(content)[0], content.get("meta")
    except OptionError as error:
        raise OptionError(f"not a file of mmdet: no 'state_dict' of tensors ({error}); take a checkpoint") from error
    chosen, others = _choose(state, prefix)
    averaged = {f"ema_{key.replace('.', '_')}" for key in state} & state.keys()
    weights, left = {}, set()
    if averaged:
        left.add(EMA.format(count=len(averaged)))
    for key, value in state.items():
        if key in averaged:
            continue
        if not key.startswith(chosen) or any(key.startswith(other) for other in others):
            left.add(next((p for p in others if key.startswith(p)), key.partition(".")[0] + "."))
        elif not _BUFFER_OF_GFL.search(key):
            weights[key.removeprefix(chosen)] = value
    require_sound(weights, "the weights")
    facts = meta if isinstance(meta, Mapping) else {}
    config = next((facts[k] for k in ("cfg", "config") if isinstance(facts.get(k), str)), "")
    return MmdetFile(weights, _class_names(facts), config, tuple(sorted(left)))


def _choose(state: Mapping[str, Tensor], prefix: str | None) -> tuple[str, list[str]]:
    """The prefix to take, and those of other detectors that must not be mixed up with it."""
    found = sorted({match[1] for key in state if (match := _STEM.fullmatch(key))})
    if not found:
        part = foreign_part(state)
        named = f"{part}; kdcli takes plain ResNets and ResNeXts" if part else "not of an mmdet detector on a ResNet"
        raise OptionError(f"no 'backbone.conv1.weight': the weights are {'those of ' if part else ''}{named}")
    if prefix is not None:
        wanted = f"{prefix.removesuffix('.')}." if prefix else ""
        if wanted not in found:
            raise OptionError(f"--prefix '{prefix}': no detector of that prefix; the file has {_shown(found)}")
    else:
        students = [p for p in found if p.startswith("student")]
        if "" in found:
            wanted = ""
        elif len(found) == 1 or len(students) == 1:
            wanted = (students or found)[0]
        else:
            raise OptionError(f"the file holds several detectors ({_shown(found)}); choose one with --prefix")
    return wanted, [p for p in found if p != wanted and p.startswith(wanted)]


def _shown(prefixes: list[str]) -> str:
    return ", ".join(f"'{p}'" for p in prefixes)


def _class_names(meta: Mapping[str, Any]) -> list[str] | None:
    """``meta.dataset_meta.classes`` (3.x; ``CLASSES`` in its first releases) or ``meta.CLASSES`` (2.x)."""
    data = meta.get("dataset_meta")
    places = [(data, "classes"), (data, "CLASSES"), (meta, "CLASSES")]
    for table, key in places:
        names = table.get(key) if isinstance(table, Mapping) else None
        if isinstance(names, str):  # ('person') without its comma
            return [names]
        if isinstance(names, (list, tuple)) and names and all(isinstance(n, str) for n in names):
            return list(names)
    return None
