"""What a caller passes, checked where it comes in: one line that says what to give, not an error from deep inside."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from kdcli.errors import DataError, OptionError, did_you_mean
from kdcli.methods.resolve import name_methods
from kdcli.structures import RowKey

Key = tuple[int, str]  # (image id in the annotations, view)
Boxes = tuple[Tensor | ArrayLike, Tensor | ArrayLike]  # [G, 4] xyxy image pixels, [G] labels in 0..K-1


def store_path(path: object) -> str:
    """A folder or a URL as text. Raises OptionError for nothing, and for what is no path."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
    if not text:
        raise OptionError(f"{path!r} names no store; give its folder, or its URL as a str")
    return str(text)


def method_list(methods: object) -> str:
    """A comma list of ``"ld,pfi"``, ``["ld", "pfi"]`` or None (empty): the caller's, so that files in it may be run.

    Raises OptionError for anything else.
    """
    if methods is None:
        return ""
    names = [methods] if isinstance(methods, str) else methods
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise OptionError(f"methods = {methods!r}: give their names, as 'ld,pfi' or ['ld', 'pfi']")
    text = ",".join(names)
    name_methods(text)
    return text


def method_options(options: object, known: Iterable[str], methods: str) -> dict[str, dict[str, Any]]:
    """Tables of options, by method. Raises OptionError for another shape, and for one of a method that is not used."""
    if not isinstance(options, Mapping):
        raise OptionError(f"options = {options!r}: give a table for each method, as {{'ld': {{'temperature': 8.0}}}}")
    for name, table in options.items():
        if name not in known:
            raise OptionError(
                f"options of '{name}' are not used: methods are '{methods}'{did_you_mean(str(name), known)}"
            )
        if not isinstance(table, Mapping):
            raise OptionError(f"options of '{name}' = {table!r}: give a table, as {{'temperature': 8.0}}")
    return {name: dict(table) for name, table in options.items()}


def row_key(image_id: object, view: str) -> RowKey:
    """The row of an image in a view. Raises OptionError for an image id that is no whole number."""
    try:
        return RowKey(operator.index(image_id), view)  # type: ignore[arg-type]  # numpy's and torch's integers too
    except TypeError as error:
        raise OptionError(f"image id {image_id!r}: give a whole number, as in the annotations") from error


def row_keys(keys: object) -> list[RowKey]:
    """The rows of a batch. Raises OptionError when there are none, or for what is not (image id, view)."""
    named: list[Any] = list(keys) if isinstance(keys, Iterable) else [keys]
    if not named:
        raise OptionError("a batch needs at least one (image id, view)")
    for key in named:
        if not isinstance(key, tuple | list) or len(key) != 2:
            raise OptionError(
                f"a batch is a list of (image id, view), e.g. [(17, 'identity')]; {key!r} is no such pair"
            )
    return [row_key(*key) for key in named]


def row_targets(targets: object, keys: Sequence[RowKey]) -> list[tuple[Tensor, Tensor]]:
    """Boxes [G, 4] float32 and labels [G] int64 of each of ``keys``, on the CPU.

    Raises OptionError unless there is a pair for each, with a label for every box; DataError for what is no boxes.
    """
    given: list[Any] = list(targets) if isinstance(targets, Sequence) else [targets]
    for pair in given:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise OptionError("targets: give (boxes [G, 4], labels [G]) for each (image id, view) of the batch")
    if len(given) != len(keys):
        raise OptionError(
            f"targets are of {len(given)} images, the batch has {len(keys)}: give (boxes, labels) for each"
        )
    found = []
    for key, (boxes, labels) in zip(keys, given, strict=True):
        corners, classes = as_boxes(boxes), _as_labels(labels, key)
        if classes.shape != corners.shape[:1]:
            raise OptionError(
                f"targets of {key}: labels of shape {list(classes.shape)} for {len(corners)} boxes; give [{len(corners)}]"
            )
        found.append((corners, classes))
    return found


def as_boxes(boxes: Any) -> Tensor:
    """[G, 4] float32 on the CPU. Raises DataError for another shape, and for what is no numbers."""
    wanted = "give [G, 4], x1 y1 x2 y2 in pixels"
    try:
        found = torch.as_tensor(boxes, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:  # torch has one for each kind of what it cannot read
        raise DataError(f"boxes of {type(boxes).__name__} are no numbers of one shape; {wanted}") from error
    if found.numel() == 0:
        return found.reshape(0, 4)
    if found.ndim != 2 or found.shape[1] != 4:
        raise DataError(f"boxes of shape {list(found.shape)}: {wanted}")
    return found


def _as_labels(labels: Any, key: RowKey) -> Tensor:
    try:
        return torch.as_tensor(labels, dtype=torch.int64).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"targets of {key}: labels are no whole numbers; give [G], positions in Store.classes"
        ) from error


def batch_size(size: object) -> int:
    """Images of a batch. Raises OptionError for less than one, and for no whole number."""
    if not isinstance(size, int) or size < 1:
        raise OptionError(f"size = {size!r}: a batch has a whole number of images, 1 or more")
    return size
