"""PFI's share of the gradient by the number of class outputs of a cell: today's sum over them, and the mean it was before.

    python benchmarks/pfi_share.py --data DATA --weights FOLDER --out OUT

DATA is in COCO layout; FOLDER has mobilenet_v2_imagenet.pth and shufflenet_v2_x0_5_backbone.pth, state dicts of torchvision's
networks. For each detector and number of
classes a teacher is trained, then two students from it, live: with the default weight, and with the one that is the same as
1.5 on the mean over the A*K outputs. With one class all of the data's classes are one; with more than it has, the others
never occur, as most classes of COCO do not in an image. Run the same command again to go on: finished runs are kept. The
table goes to stdout and ``OUT/pfi_share.json``. Shares are those of results.csv: of the sum of all terms' gradient norms,
on the first batch of each epoch.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import kdcli
from kdcli.data.coco import open_split
from kdcli.files import atomic_write_text

ANCHORS = {"gfl": 1, "retinanet": 9}  # of a cell
CLASSES = (1, 3, 20, 80)
MEAN_WEIGHT = 1.5  # that the mean over a cell's outputs had
TEACHER_EPOCHS, STUDENT_EPOCHS = 8, 3


def with_classes(data: Path, out: Path, count: int) -> Path:
    """``data`` with ``count`` classes: one for all of its own, or its own and others that never occur. Images are linked."""
    folder = out / f"data-{count}"
    if (folder / "annotations" / "val.json").exists():
        return folder
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        dataset = open_split(data, split)
        content = json.loads(Path(dataset.annotations_path).read_text())
        own = content["categories"]
        if count == 1:
            content["categories"] = [{"id": 1, "name": "object"}]
            content["annotations"] = [{**a, "category_id": 1} for a in content["annotations"]]
        else:
            start = max(c["id"] for c in own) + 1
            content["categories"] = own + [{"id": start + k, "name": f"absent {k}"} for k in range(count - len(own))]
        if not (folder / split).exists():
            (folder / split).symlink_to((data / split).resolve(), target_is_directory=True)
        atomic_write_text(folder / "annotations" / f"{split}.json", json.dumps(content))
    return folder


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
    """Every pair of a detector and a number of classes."""
    found = []
    for detector, anchors in ANCHORS.items():
        small = {"name": f"{detector}_shufflenet_v2_x0_5", "fpn_channels": 64, "tower_convs": 2, "bn": "train"}
        large = {"name": f"{detector}_mobilenet_v2", "fpn_channels": 128, "bn": "train"}
        for classes in CLASSES:
            data = with_classes(args.data, args.out, classes)
            common = {
                "data": data, "canvas": args.canvas, "batch": 8, "optim": {"lr": 0.02}, "workers": 0,
                "eval_every": TEACHER_EPOCHS,
            }  # fmt: skip
            folder = args.out / f"{detector}-{classes}"
            weights = args.weights / "mobilenet_v2_imagenet.pth"
            teacher = once(
                kdcli.train, folder / "teacher", epochs=TEACHER_EPOCHS, model=large, backbone_weights=weights, **common
            )
            student = {
                "model": small,
                "backbone_weights": args.weights / "shufflenet_v2_x0_5_backbone.pth",
                "epochs": STUDENT_EPOCHS,
            }
            row: dict[str, Any] = {"detector": detector, "anchors": anchors, "classes": classes}
            row["teacher_ap"] = json.loads((teacher / "metrics.json").read_text())["ap"]
            outputs = anchors * classes
            for rule, options in (("sum", {}), ("mean", {"weight": MEAN_WEIGHT / outputs**2})):
                settings = {"teacher": teacher, "method": "pfi", "methods": {"pfi": options}}
                row[rule] = shares(once(kdcli.distill, folder / rule, **settings, **student, **common))
            found.append(row)
            print(line(row), flush=True)
    return found


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [row["detector"], str(row["anchors"]), str(row["classes"]), f"{row['teacher_ap']:.1f}"]
    for rule in ("sum", "mean"):
        cells.append(", ".join(f"{100 * e['share']:.2g} %" for e in row[rule]))
        cells.append(", ".join(f"{e['loss'] / e['detection']:.2g}" for e in row[rule]))
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--canvas", default="192x256")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(
        "| detector | A | K | teacher's AP | sum: share | sum: loss to detection | mean: share | mean: loss to detection |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    found = measure(args)
    atomic_write_text(args.out / "pfi_share.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
