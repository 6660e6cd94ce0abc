"""Variants of reference files, as somebody else might have written them: other names, fewer arrays, more, other numbers.

``variants_of`` makes those of one file in a folder of their own, each with what must come of it: None where everything in it
must be checked and agree, or a pattern of the message with which it must fail.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

File = dict[str, Any]  # arrays by name

GRADIENT = re.compile(r"d_loss_\w+|\w+_grad_\w+")
LETTERS = {"A": "Q7", "B": "K", "R": "R2", "Z": "Empty"}
# what is computed from and not compared: inputs, places of values, hyper-parameters
INPUT = re.compile(
    r"(?:\w+_)?(?:pred|soft_label|weight|T|loss_weight|avg_factor|cls_shift)|labels|labels_nobg|(?:student|teacher)_logits"
    r"|gt_inds_img\d+|\w+__idx|s\d_feat_\w+|s\d_\w+_roimask_l\d|adapt_\w+"
)
TERM = re.compile(r"(loss_(?!\w*(?:T|weight)$)\w+)|(\w+?_losskd_\w+)|((?:beta\d\w*?|box_T\d+|cls_T\d+)_loss_\w+)")
INVALID = {"gt_inds": -2, "max_overlaps": -2, "vlr": -1, "vlr_unionfixed": -1, "im": -1}  # what marks such anchors


@dataclass(frozen=True)
class Variant:
    """name: of the file, without its ending. fails: what the message must match; None: it must pass."""

    what: str
    folder: Path
    name: str
    fails: str | None


@dataclass(frozen=True)
class Source:
    """A reference file, its folder and kind, and where variants go."""

    file: Path
    kind: str
    out: Path

    @property
    def arrays(self) -> File:
        with np.load(self.file, allow_pickle=False) as held:
            return {key: held[key] for key in held.files}

    def write(self, what: str, arrays: File, *, name: str | None = None, fails: str | None = None) -> Variant:
        """A variant in a folder of its own, beside the other files of its source."""
        folder = self.out / f"{self.file.stem}-{re.sub(r'[^a-z0-9]+', '-', what.lower())}"
        folder.mkdir(parents=True)
        for path in self.file.parent.glob("*.npz"):
            if path.stem == "batches" or "inputs" in path.stem:
                (folder / path.name).symlink_to(path.resolve())
        target = folder / f"{name or self.file.stem}.npz"
        target.unlink(missing_ok=True)
        np.savez(target, **arrays)
        return Variant(what, folder, target.stem, fails)


def variants_of(source: Source) -> Iterator[Variant]:
    """Every variant of a file that its kind allows."""
    for make in (renamed, without_gradients, one_term, other_types, more, zeroed, corrupted):
        yield from make(source)


def renamed(source: Source) -> Iterator[Variant]:
    """Without the batch, with a suffix, in another order, and with other letters for every batch."""
    rest = source.file.stem.removeprefix(source.kind).strip("_")
    if rest:
        yield source.write("no batch in its name", source.arrays, name=source.kind)
        yield source.write("other parts in its name", source.arrays, name=f"{source.kind}_second_{rest}_run")
    variant = source.write("other letters", {with_letters(k): v for k, v in source.arrays.items()},
                           name=f"{source.kind}_{with_letters(rest)}" if rest else source.kind)  # fmt: skip
    for name in ("batches", "defeat_neck_inputs"):
        path = source.file.parent / f"{name}.npz"
        if path.exists() and path != source.file:
            with np.load(path, allow_pickle=False) as held:
                moved = {with_letters(key): held[key] for key in held.files}
            (variant.folder / path.name).unlink()
            np.savez(variant.folder / path.name, **moved)
    yield variant


def with_letters(text: str) -> str:
    """``A_img0_gt_bboxes`` with the other letter of its batch, and what a file's name says of it."""
    found = re.fullmatch(r"(s\d_)?([ABRZ])((?:_\w+)?)", text)
    return f"{found[1] or ''}{LETTERS[found[2]]}{found[3]}" if found else text


def without_gradients(source: Source) -> Iterator[Variant]:
    """The values alone; and the first gradient alone, where a value stands beside it."""
    arrays = source.arrays
    kept = {key: value for key, value in arrays.items() if not GRADIENT.fullmatch(key)}
    if len(kept) < len(arrays):
        yield source.write("without gradients", kept)


def one_term(source: Source) -> Iterator[Variant]:
    """Each term alone with its gradients, beside the inputs that the file itself has."""
    arrays = source.arrays
    terms = [key for key in arrays if TERM.fullmatch(key) and not GRADIENT.fullmatch(key) and not INPUT.fullmatch(key)]
    for term in terms if len(terms) > 1 else ():
        of_term = {f"d_{term}", term.replace("_loss_", "_grad_"), term.replace("_losskd", "_grad_losskd")}
        kept = {
            key: value
            for key, value in arrays.items()
            if key == term or (INPUT.fullmatch(key) and not key.startswith("d_")) or key.split("__")[0] in of_term
        }
        yield source.write(f"only {term}", kept)


def other_types(source: Source) -> Iterator[Variant]:
    """Backwards, and in float64: the same numbers."""
    arrays = source.arrays
    yield source.write("backwards", dict(reversed(arrays.items())))
    wide = {
        k: v.astype(np.float64) if v.dtype == np.float32 and not INPUT.fullmatch(k) else v for k, v in arrays.items()
    }
    yield source.write("float64", wide)


def more(source: Source) -> Iterator[Variant]:
    """An array of no known name; a known one that the file did not have, by a formula of its own."""
    yield source.write(
        "one array more", {**source.arrays, "mystery_l0": np.zeros(3, np.float32)}, fails="no check for.*mystery"
    )
    if source.kind == "kl":
        yield source.write("another temperature", {**source.arrays, **kl_by_hand(source.arrays)})
    if "avg_factor" in source.arrays and source.kind in ("gfl", "atss", "retina"):
        yield source.write("the normaliser twice", {**source.arrays, "num_total_samples": source.arrays["avg_factor"]})
        wrong = {**source.arrays, "num_total_samples": source.arrays["avg_factor"] + 1}
        yield source.write("another normaliser", wrong, fails="num_total_samples")
    if source.kind == "gfl":
        scores = scores_by_hand(source)
        yield source.write("scores too", {**source.arrays, **scores})
        worse = {**scores, "score_l0": scores["score_l0"] * 1.001}
        if scores["score_l0"].any():
            yield source.write("other scores", {**source.arrays, **worse}, fails="score_l0")
    if source.kind in ("gfl", "ld_mmdet3"):
        wrong = {**source.arrays, "loss_mystery": np.ones(5, np.float32)}
        yield source.write("one loss more", wrong, fails="no check for loss_mystery")


def scores_by_hand(source: Source) -> File:
    """``score_l<k>`` of a GFL file: the IoU of each positive's decoded box with the box target that the file has, in numpy."""
    with np.load(source.file.parent / "inputs_student.npz", allow_pickle=False) as held:
        maps = {key: held[key].astype(np.float64) for key in held.files}
    made = {}
    for k, stride in enumerate((8, 16, 32, 64, 128)):
        images, _, rows, columns = maps[f"bbox_l{k}"].shape
        edges = maps[f"bbox_l{k}"].reshape(images, 4, 17, rows * columns)
        shares = np.exp(edges - edges.max(axis=2, keepdims=True))
        distances = (shares * np.arange(17)[:, None]).sum(axis=2) / shares.sum(axis=2) * stride  # [B, 4, cells]
        x, y = np.tile(np.arange(columns), rows) * stride, np.repeat(np.arange(rows), columns) * stride
        left, top, right, bottom = x - distances[:, 0], y - distances[:, 1], x + distances[:, 2], y + distances[:, 3]
        goal = source.arrays[f"bbox_targets_l{k}"].astype(np.float64)
        width = np.clip(np.minimum(right, goal[..., 2]) - np.maximum(left, goal[..., 0]), 0, None)
        inter = width * np.clip(np.minimum(bottom, goal[..., 3]) - np.maximum(top, goal[..., 1]), 0, None)
        area = (goal[..., 2] - goal[..., 0]) * (goal[..., 3] - goal[..., 1])
        union = (right - left) * (bottom - top) + area - inter
        made[f"score_l{k}"] = np.where(source.arrays[f"labels_l{k}"] < 20, inter / np.maximum(union, 1e-6), 0)
    return made


def kl_by_hand(arrays: File) -> File:
    """``box_T3_...`` of the file's own edges at temperature 3, in numpy."""
    pred, label = (arrays[f"box_T10_{name}"].astype(np.float64) for name in ("pred", "soft_label"))
    p, q = (np.exp(z / 3 - np.logaddexp.reduce(z / 3, axis=1, keepdims=True)) for z in (label, pred))
    rows = 9 * (p * (np.log(p) - np.log(q))).mean(axis=1)
    made: dict[str, NDArray[np.float64]] = {
        "pred": pred,
        "soft_label": label,
        "loss_none": rows,
        "loss_mean": rows.mean().reshape(1),
    }
    return {f"box_T3_{name}": value for name, value in made.items()}


def zeroed(source: Source) -> Iterator[Variant]:
    """0 where a mark says that an anchor is outside the valid area, as official code has it; and a number that is neither."""
    if source.kind not in ("atss_assign", "vlr_im_region"):
        return
    changes: tuple[tuple[str, float, str | None], ...] = (("zeroed", 0, None), ("wrongly marked", 7, "anchors outside"))
    for what, number, fails in changes:
        arrays, changed = source.arrays, 0
        for key, value in arrays.items():
            found = re.fullmatch(r"\w+_img\d+_(gt_inds|max_overlaps|vlr|vlr_unionfixed|im)(?:_\w+)?", key)
            marker = INVALID[found[1]] if found else None
            if found and found[1] in INVALID and bool((value == marker).any()):
                arrays[key], changed = np.where(value == marker, np.asarray(number, value.dtype), value), changed + 1
        if changed:
            yield source.write(f"invalid anchors {what}", arrays, fails=fails)


def corrupted(source: Source) -> Iterator[Variant]:
    """One value of each array changed by a thousandth of the largest: each array is really compared."""
    for key, value in source.arrays.items():
        if (
            INPUT.fullmatch(key) or not value.size
        ):  # gt_inds of RetinaNet too: some of its anchors may be chosen so or so
            continue
        changed = value.copy().reshape(-1)
        place = int(np.abs(changed.astype(np.float64)).argmax())
        size = np.abs(changed.astype(np.float64)).max()
        changed[place] = changed[place] + (1 if changed.dtype.kind in "iu" else max(size, 1e-3) * 2e-3)
        if changed.dtype == np.uint8:
            changed[place] = 1 - value.reshape(-1)[place]
        yield source.write(f"wrong {key}", {**source.arrays, key: changed.reshape(value.shape)}, fails=".")
