"""Damaged annotation files, fed to every command that reads one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.attack.case import Case, Scratch, Step, files, printed, run_result
from tests.support.attack.mutate_bytes import damage, replace_by_no_file
from tests.support.attack.mutate_values import damage_json, show
from tests.support.attack.world import HERE, World

CORE = {"bbox", "image_id", "category_id", "file_name", "width", "height"}  # what every command goes by

Fault = Callable[[Random, dict[str, Any]], str]


def make(world: World, rng: Random, number: int, scratch: Scratch, damaged: bool) -> Case:
    """A data set with one annotation file changed, that of the training split twice out of three times."""
    data = Path(shutil.copytree(world.shapes, scratch.into / "data"))
    split = "val" if number % 3 == 2 else "train"
    path = data / "annotations" / f"{split}.json"
    before = path.read_text()
    what, expect = _damage(rng, path, json.loads(before)) if damaged else ("undamaged", "any")
    same = damaged and path.is_file() and path.read_bytes() == before.encode()
    return Case(
        "" if same or not what else f"{split}: {what}", _steps(world, scratch, data, split, number // 3, expect)
    )


def _steps(world: World, scratch: Scratch, data: Path, split: str, turn: int, expect: str) -> list[Step]:
    """What reads the set: a store and a run are bound to its training split, and what only copies rows reads no other."""
    out, train = scratch.out, split == "train"
    bound = "same" if train else expect
    rows = "same" if train else "any"
    root, teacher = str(data), str(world.teacher_pt)
    trained = "warned" if expect == "count" else expect  # a set without anything to train on
    told = "warned" if expect in ("count", "said") else expect
    scored = "any" if expect in ("count", "said") else expect
    common = "any" if expect == "said" else trained
    run, made = run_result(lambda s: s.out / "run"), files(lambda s: s.out / "store")
    steps = [
        Step("data check", ["data", "check", root, "--json"], told),
        Step(
            "eval", ["eval", teacher, "--data", root, "--split", split, *HERE[:2], "--out", str(out / "scores")], scored
        ),
    ]
    show = ["cache", "show", str(world.store), "1", "--data", root, "--out", str(out / "row.png")]
    again = ["cache", "verify", str(world.store), "--teacher", teacher, "--data", root, "--json"]
    convert = ["convert", str(world.root / "mmdet.pth"), "--from", "mmdet", "--data", root, "--out", str(out / "c.pt")]
    resume = ["distill", "--resume", str(scratch.into / "run"), "--data", root]
    add = ["cache", "add", str(scratch.into / "store"), "--data", root, "--method", "pfi"]
    stores = [str(world.store_identity), str(world.store_hflip)]
    slow = [
        Step("distill", world.distill(out / "run", data=data), bound if train else scored, run),
        Step("train", world.train(out / "run", data=data), common if train else scored),
        Step("show", show, rows, files(lambda s: s.out)),
        Step("cache-teacher", world.cache_teacher(out / "store", data=data), common if train else "any"),
        Step("verify --teacher", again, rows, printed),
        Step("convert", convert, "refuse"),  # its three classes are not those of the set
        Step("resume", resume, bound if train else scored, run_result(lambda s: s.into / "run"), in_place=True),
        Step("add", add, rows, files(lambda s: s.into / "store"), in_place=True),
        Step("merge", ["cache", "merge", *stores, "--data", root, "--out", str(out / "store")], "any", made),
    ]
    chosen = slow[turn % len(slow)]
    if chosen.name == "resume":
        shutil.copytree(world.stopped, scratch.into / "run")
    if chosen.name == "add":
        shutil.copytree(world.store_ld, scratch.into / "store")
    return [*steps, chosen]


def _damage(rng: Random, path: Path, document: dict[str, Any]) -> tuple[str, str]:
    """Change the file; what was done, and what success would have to mean where any data set is taken."""
    kind = rng.choice(["bytes", "values", "values", "values", "fault", "fault", "kind"])
    if kind == "bytes":
        return damage(rng, path), "any"
    if kind == "kind":
        return replace_by_no_file(rng, path), "refuse"
    if kind == "fault":
        fault, expect = rng.choice(FAULTS)
        what = fault(rng, document)
        path.write_text(json.dumps(document))
        return what, expect
    text, what, at = damage_json(rng, document)
    path.write_text(text, errors="surrogatepass")
    wrong = what in ("type", "nan", "deep") and bool(CORE & set(at))
    core = wrong or (what == "missing" and bool(at) and at[-1] in CORE)
    return f"{what} at {show(at)}", "refuse" if core else "any"


def _note(rng: Random, document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = rng.choice(document["annotations"])
    return found


def _unknown_image(rng: Random, document: dict[str, Any]) -> str:
    _note(rng, document)["image_id"] = 10**6
    return "an annotation of an unknown image"


def _unknown_category(rng: Random, document: dict[str, Any]) -> str:
    _note(rng, document)["category_id"] = 99
    return "an annotation of an unknown category"


def _negative_box(rng: Random, document: dict[str, Any]) -> str:
    _note(rng, document)["bbox"][rng.choice([2, 3])] *= -1
    return "a box of negative size"


def _outside(rng: Random, document: dict[str, Any]) -> str:
    _note(rng, document)["bbox"][rng.choice([0, 1])] = rng.choice([5000, 1e30, -5000])
    return "a box outside of the image"


def _same_image_id(rng: Random, document: dict[str, Any]) -> str:
    document["images"][1]["id"] = document["images"][0]["id"]
    return "two images of one id"


def _same_note_id(rng: Random, document: dict[str, Any]) -> str:
    document["annotations"][1]["id"] = document["annotations"][0]["id"]
    return "two annotations of one id"


def _same_category_id(rng: Random, document: dict[str, Any]) -> str:
    document["categories"][1]["id"] = document["categories"][0]["id"]
    return "two categories of one id"


def _same_name(rng: Random, document: dict[str, Any]) -> str:
    document["categories"][1]["name"] = document["categories"][0]["name"]
    return "two categories of one name"


def _other_size(rng: Random, document: dict[str, Any]) -> str:
    document["images"][0][rng.choice(["width", "height"])] += rng.choice([1, 50, -1, 10**12])
    return "a size that is not the file's"


def _no_file(rng: Random, document: dict[str, Any]) -> str:
    document["images"][0]["file_name"] = rng.choice(
        ["nowhere.jpg", "../../../../../etc/passwd", "", ".", "a\x1b[2Jb.jpg", "\0", "/dev/zero"]
    )
    return "a file that is no image of the set"


def _no_boxes(rng: Random, document: dict[str, Any]) -> str:
    kind = rng.choice(["none", "crowd", "tiny"])
    if kind == "none":
        document["annotations"] = []
    for note in document["annotations"]:
        if kind == "crowd":
            note["iscrowd"] = 1
        else:
            note["bbox"] = [v / 100 for v in note["bbox"]]
    return f"no box that can be trained on ({kind})"


def _one_file_twice(rng: Random, document: dict[str, Any]) -> str:
    document["images"].append({**document["images"][0], "id": 777})
    return "one file under two ids"


def _area(rng: Random, document: dict[str, Any]) -> str:
    for note in document["annotations"]:
        note["area"] = rng.choice([-1, 1e12])
    return "areas that cannot be"


# what all that take any data set have to refuse; what `data check` has to warn of (said), and training too (count)
FAULTS: list[tuple[Fault, str]] = [
    *((fault, "refuse") for fault in (_unknown_image, _unknown_category, _outside, _same_image_id,
    _same_note_id,
                                      _same_category_id, _same_name, _other_size, _no_file)),
    (_no_boxes, "count"), (_negative_box, "said"), (_one_file_twice, "said"), (_area, "said"),
]  # fmt: skip
