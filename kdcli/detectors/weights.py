"""Checkpoints: a detector with its class list and canvas as one dictionary of tensors and plain values.

The weights carry their sha256, and everything else a digest that names it, since PyTorch reads a flipped bit as data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcli.classes import ClassList
from kdcli.detectors.base import Detector, ModelSpec
from kdcli.detectors.build import build_to_fill
from kdcli.detectors.soundness import require_finite, require_plain
from kdcli.detectors.state_dicts import is_said, name_checkpoint
from kdcli.digest import DIGEST, digest_of, is_intact
from kdcli.errors import MissingPathError, OptionError
from kdcli.files import load_torch
from kdcli.structures import Canvas

FORMAT = "kdcli.checkpoint"
VERSION = 1


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint says beside its weights. path: the file. canvas: as ``Canvas.parse`` reads it."""

    path: Path
    classes: ClassList
    canvas: str
    weights_sha256: str
    extra: dict[str, Any]


def export(detector: Detector, classes: ClassList, canvas: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint of ``detector``, to be written by ``files.atomic_save``; its tensors are copies on the CPU.

    extra: tensors and plain values (numbers, strings, lists, dicts), e.g. an optimiser's state. ``weights_sha256`` is the
    identity of the weights, whatever else the file says; ``digest`` is over the whole file.
    """
    weights = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in detector.state_dict().items()}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": detector.spec.to_json(),
        "classes": classes.to_json(),
        "canvas": canvas,
        "weights": weights,
        "weights_sha256": weights_sha256(weights),
        "extra": dict(extra),
    }
    return {**content, DIGEST: digest_of(_beside_weights(content))}


def load_detector(path: Path | str) -> tuple[Detector, CheckpointMeta]:
    """The detector of a checkpoint file, or of a run folder's ``weights/last.pt``, on the CPU and in eval mode.

    Draws nothing from torch's global generator, so that a run with a live teacher starts from the same student as one
    without. Raises MissingPathError, or OptionError when the file is foreign, torn or corrupt, or its weights are not
    finite.
    """
    file = checkpoint_path(path)
    content = load_torch(file, what="checkpoint")
    _check_format(content, file)
    spec, classes = _described(content, file)
    if not is_intact(_beside_weights(content)):
        raise OptionError(f"checkpoint '{file}': corrupt, its content does not match its digest; copy it again")
    weights = content["weights"]
    require_plain(weights, f"checkpoint '{file}'")
    try:
        detector = build_to_fill(spec, weights)
        _require_tensors(weights, detector.state_dict())
        detector.load_state_dict(weights, strict=True)
    except (OptionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OptionError(f"checkpoint '{file}': {reason}") from error
    if weights_sha256(weights) != content["weights_sha256"]:
        raise OptionError(f"checkpoint '{file}': corrupt, its weights do not match their sha256; copy it again")
    require_finite(weights, f"checkpoint '{file}'")
    meta = CheckpointMeta(file, classes, content["canvas"], content["weights_sha256"], content["extra"])
    return detector.eval(), meta


def checkpoint_path(path: Path | str) -> Path:
    """``path`` itself, or ``weights/last.pt`` of a run folder. Raises MissingPathError."""
    path = Path(path)
    file = path / "weights" / "last.pt" if path.is_dir() else path
    if not file.is_file():
        where = f"run '{path}': has no weights/last.pt" if path.is_dir() else f"checkpoint '{path}': no such file"
        raise MissingPathError(where)
    return file


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hex sha256 of the names, dtypes, shapes, bytes of ``state``; order and memory layout do not matter."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_format(content: object, file: Path) -> None:
    if not isinstance(content, dict) or not is_said(content.get("format"), FORMAT):
        raise OptionError(f"checkpoint '{file}': not a kdcli checkpoint ({name_checkpoint(content)})")
    if not is_said(content.get("version"), VERSION):
        raise OptionError(
            f"checkpoint '{file}': version {repr(content.get('version'))[:40]}, this kdcli reads {VERSION}"
        )
    kinds = {"model": dict, "classes": list, "canvas": str, "weights": dict, "weights_sha256": str, "extra": dict}
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise OptionError(f"checkpoint '{file}': '{key}' is missing or not a {kind.__name__}")
    # one flipped bit in the name of the digest would make it a file from before there was one
    strange = [key for key in content if key not in {"format", "version", *kinds, DIGEST}]
    if strange:
        raise OptionError(
            f"checkpoint '{file}': has a field {strange[0]!r:.40} that kdcli does not write; copy it again"
        )


def _described(content: Mapping[str, Any], file: Path) -> tuple[ModelSpec, ClassList]:
    """The model and the classes that a checkpoint names. Raises OptionError for what is none."""
    try:
        spec = ModelSpec.from_json(content["model"])
        Canvas.parse(content["canvas"])
    except OptionError as error:
        raise OptionError(f"checkpoint '{file}': {error}") from error
    entries = content["classes"]
    if len(entries) != spec.num_classes:
        raise OptionError(f"checkpoint '{file}': {len(entries)} classes for {spec.num_classes} outputs")
    for entry in entries:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or type(entry.get("name")) is not str:
            raise OptionError(f"checkpoint '{file}': 'classes' is not a list of ids and names")
    try:
        return spec, ClassList.from_json(entries)
    except ValueError as error:
        raise OptionError(
            f"checkpoint '{file}': 'classes' is not a list of ids and names, each once ({error})"
        ) from error


def _beside_weights(content: Mapping[str, Any]) -> dict[str, Any]:
    """What the digest is made of: the weights are in it by their sha256, which is checked apart."""
    return {key: value for key, value in content.items() if key != "weights"}


def _require_tensors(given: Mapping[Any, Any], wanted: Mapping[str, Tensor]) -> None:
    """Raises OptionError for weights of another kind than a detector's; names and shapes are PyTorch's to compare."""
    for name, value in given.items():
        if type(name) is not str or not isinstance(value, Tensor):
            raise OptionError(f"'weights' holds {str(name)[:40]!r}, a {type(value).__name__}: not names and tensors")
        if name in wanted and value.dtype != wanted[name].dtype:
            raise OptionError(f"{name} is {value.dtype}, the model's is {wanted[name].dtype}")
