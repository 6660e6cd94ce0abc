"""PFI's share of the gradient by the number of class outputs of a cell: today's sum over them, and the mean it was before.

    python benchmarks/pfi_share.py --data DATA --teacher RUN --teacher RUN --backbone-weights FILE --out OUT

DATA is in COCO layout, each RUN a detector that was trained on it, FILE a state dict of torchvision's shufflenet_v2_x0_5,
or ``none``. For each teacher and number of classes students of its detector are trained from it, live: with the default
weight, with GFL's where that is another one, and with the one that is the same as 1.5 on the mean over the A*K outputs.
Beyond the classes of DATA there are others that never occur, as most classes of COCO do not in an image: the teacher's
class layer gets outputs for them that say no, as a trained one does. With one class, that class alone is left of data and
teacher. Run the same command again to go on: finished runs are kept. The table goes to stdout and ``OUT/pfi_share.json``.
Shares are those of results.csv: of the sum of all terms' gradient norms, on the first batch of each epoch.
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import kdcli
from kdcli.classes import ClassList
from kdcli.data.coco import open_split
from kdcli.detectors.base import Detector
from kdcli.detectors.build import build_detector
from kdcli.detectors.weights import export, load_detector
from kdcli.files import atomic_save, atomic_write_text
from kdcli.methods.pfi import WEIGHT

CLASSES = (1, 3, 20, 80)
MEAN_WEIGHT = 1.5  # that the mean over a cell's outputs had
EPOCHS = 3
NO = -9.0  # a logit of a class that a trained detector is sure is not there: 1e-4


def with_classes(data: Path, out: Path, count: int) -> Path:
    """``data`` with ``count`` classes: its own and others that never occur, or the most frequent alone. Images are linked."""
    folder = out / f"data-{count}"
    if (folder / "annotations" / "val.json").exists():
        return folder
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    kept = most_frequent(data)
    for split in ("train", "val"):
        content = json.loads(Path(open_split(data, split).annotations_path).read_text())
        own = sorted(content["categories"], key=lambda c: c["id"])
        if count == 1:
            content["categories"] = [own[kept]]
            content["annotations"] = [a for a in content["annotations"] if a["category_id"] == own[kept]["id"]]
        else:
            start = own[-1]["id"] + 1
            content["categories"] = own + [{"id": start + k, "name": f"absent {k}"} for k in range(count - len(own))]
        if not (folder / split).exists():
            (folder / split).symlink_to((data / split).resolve(), target_is_directory=True)
        atomic_write_text(folder / "annotations" / f"{split}.json", json.dumps(content))
    return folder


def most_frequent(data: Path) -> int:
    """The index of the class with the most boxes."""
    content = json.loads(Path(open_split(data, "train").annotations_path).read_text())
    ids = sorted(c["id"] for c in content["categories"])
    counts = [sum(a["category_id"] == i for a in content["annotations"]) for i in ids]
    return counts.index(max(counts))


def with_outputs(teacher: Detector, keep: list[int], count: int) -> Detector:
    """``teacher`` with ``count`` classes: those of ``keep``, then ones that it says no to everywhere."""
    wide = build_detector(replace(teacher.spec, num_classes=count))
    state, anchors, old = teacher.state_dict(), teacher.grid.num_anchors, teacher.spec.num_classes
    for name, fill in (("head.cls.weight", 0.0), ("head.cls.bias", NO)):
        value = state[name].reshape(anchors, old, *state[name].shape[1:])
        rows = value.new_full((anchors, count, *value.shape[2:]), fill)
        rows[:, : len(keep)] = value[:, keep]
        state[name] = rows.flatten(0, 1)
    wide.load_state_dict(state)
    return wide


def once(command: Any, folder: Path, **settings: Any) -> Path:
    """The run ``folder``, made by ``command`` unless it is there and finished."""
    if not (folder / "metrics.json").exists():
        command(out=folder, overwrite=True, **settings)
    return folder


def shares(run: Path) -> list[dict[str, float]]:
    """Share of PFI's term in the gradient, its value and that of the detection loss, of each epoch."""
    with (run / "results.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    detection = [name for name in rows[0] if name.startswith("loss_")]
    return [
        {
            "share": float(row["grad_share_pfi_loss"]),
            "loss": float(row["pfi_loss"]),
            "detection": sum(float(row[n]) for n in detection),
        }
        for row in rows
    ]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every pair of a teacher and a number of classes."""
    found = []
    for file in args.teacher:
        teacher, _ = load_detector(str(file))
        detector, anchors = teacher.spec.detector, teacher.grid.num_anchors
        model = {"name": f"{detector}_shufflenet_v2_x0_5", "fpn_channels": 64, "tower_convs": 2, "bn": "train"}
        for classes in CLASSES:
            data = with_classes(args.data, args.out, classes)
            names: ClassList = open_split(data, "train").classes
            keep = [most_frequent(args.data)] if classes == 1 else list(range(teacher.spec.num_classes))
            folder = args.out / f"{detector}-{classes}"
            folder.mkdir(exist_ok=True)
            atomic_save(export(with_outputs(teacher, keep, classes), names, args.canvas, {}), folder / "teacher.pt")
            row: dict[str, Any] = {"detector": detector, "anchors": anchors, "classes": classes}
            mean = MEAN_WEIGHT / (anchors * classes) ** 2
            for rule, options in (("sum", {}), ("sum-one-weight", {"weight": WEIGHT}), ("mean", {"weight": mean})):
                if rule == "sum-one-weight" and anchors == 1:
                    row[rule] = row["sum"]  # the default is the same
                    continue
                torch.manual_seed(0)
                run = once(
                    kdcli.distill, folder / rule, data=data, canvas=args.canvas, batch=8, workers=0, epochs=EPOCHS,
                    optim={"lr": 0.02}, model=model, backbone_weights=args.backbone_weights, eval_every=EPOCHS,
                    teacher=folder / "teacher.pt", method="pfi", methods={"pfi": options}, gradient_limit=0.0,
                )  # fmt: skip
                row[rule] = shares(run)
            found.append(row)
            print(line(row), flush=True)
    return found


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [row["detector"], str(row["anchors"]), str(row["classes"])]
    for rule in ("sum", "sum-one-weight", "mean"):
        cells.append(", ".join(f"{100 * e['share']:.2g} %" for e in row[rule]))
        cells.append(", ".join(f"{e['loss'] / e['detection']:.2g}" for e in row[rule]))
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, action="append", required=True)
    parser.add_argument("--backbone-weights", default="none")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--canvas", default="256x320")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rules = ("default", "sum, weight 1/6", "mean, weight 1.5")
    print("| detector | A | K | " + " | ".join(f"{r}: share | {r}: loss to detection" for r in rules) + " |")
    print("| --- " * (3 + 2 * len(rules)) + "|")
    found = measure(args)
    atomic_write_text(args.out / "pfi_share.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
