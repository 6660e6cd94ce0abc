"""How many bytes a stored row takes on real boxes, for pairs of detector and method: prints JSON, writes a table.

Rows go through the cache's own encoding and compression and are counted as a shard file would hold them. Regions depend on the
boxes alone, so a teacher need not be trained for its entries; how well codes compress does depend on its numbers. An untrained
one is therefore given class logits and boxes that spread as those of a fitted teacher do. ``--teacher`` measures a real one.

    python benchmarks/row_size.py --data COCO [--detector gfl,atss] [--methods ld,rm] [--canvas 800x1344] [--table FILE.md]
    python benchmarks/row_size.py --data COCO --teacher RUN --methods ld,bckd
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcli.data.coco import has_split, open_split
from kdcli.detectors.base import BoxBranch, Detector
from kdcli.detectors.build import ModelSpec, build_detector
from kdcli.detectors.dense.detector import DenseDetector
from kdcli.detectors.read import read
from kdcli.detectors.weights import export, load_detector
from kdcli.engine.caching.plan import StorePlan, plan_store
from kdcli.engine.caching.write import encode_row
from kdcli.engine.loading.orientation import batches_by_orientation
from kdcli.engine.loading.samples import Sample, collate
from kdcli.engine.runtime.progress import NullReporter
from kdcli.files import atomic_save
from kdcli.options import CacheOptions
from kdcli.store.encoding_policy import plan_tensors
from kdcli.store.schema import StoreSchema
from kdcli.store.shards import pack_chunk
from kdcli.tensors import BACKBONE, BOXES, CLS_LOGITS, FEATURES, RANK, Need, Tensors

DETECTORS = ("gfl", "atss", "fcos", "retinanet", "faster_rcnn")
DENSE_ONLY = ("ld", "rm", "pfi", "bckd")  # not on faster_rcnn
METHODS = (*DENSE_ONLY, "defeat", "defeat_thin", "drkd_lite")  # drkd, cwd, pkd and fgd store what defeat does
OF_FEATURES = ("pfi", "defeat", "defeat_thin", "drkd_lite")
LIMITS = {
    ("gfl", "ld"): 90e3,
    ("atss", "ld"): 90e3,
    ("retinanet", "ld"): 0.4e6,
    ("fcos", "ld"): 0.75e6,
    ("gfl", "bckd"): 1.5e6,
    **{(d, "rm"): 2e3 for d in DETECTORS},
    **{(d, "defeat"): 5.4e6 for d in DETECTORS if d != "faster_rcnn"},  # P3 to P7, 8 bits
}
TIMES = {"ld": 100.0}  # at least so many times smaller than dense float32, else 4
MICRO_BATCH = 4
INDEX_BYTES = 16  # bytes of a shard's index for each row of an array

# mean and deviation over the cells, channel by channel, of the COCO teacher of docs/results/encodings.md on its images
CLASS_SPREAD = (-5.0, 1.2)
EDGE_SPREAD = (0.0, 1.4)


@torch.no_grad()
def spread(detector: DenseDetector, images: Tensor) -> None:
    """Scales the last convolutions of an untrained head such that every class and box channel varies over the cells as a
    fitted one does: untouched, class logits would be one constant, which compresses to nothing."""
    head = detector.head
    targets = {head.cls: CLASS_SPREAD, head.box: EDGE_SPREAD}
    maps = detector.neck(detector.backbone((images.float() / 255 - detector.mean) / detector.std))
    for conv, tower in ((head.cls, head.cls_tower), (head.box, head.box_tower)):
        mean, deviation = targets[conv]
        value = torch.cat([conv(tower(m)).flatten(2) for m in maps], dim=2).transpose(0, 1).flatten(1)
        assert conv.bias is not None
        ratio = deviation / value.std(dim=1).clamp(min=1e-12)
        conv.bias.copy_(mean - (value.mean(dim=1) - conv.bias) * ratio)
        conv.weight.mul_(ratio[:, None, None, None])


def kind(detector: str, method: str) -> tuple[bool, BoxBranch]:
    """What an untrained teacher for a method needs: 256 channels where features are stored; a distribution for LD."""
    return method in OF_FEATURES, "distribution" if method == "ld" and detector != "gfl" else "default"


def make_teacher(args: argparse.Namespace, detector: str, method: str, split: str, file: Path) -> None:
    """An untrained teacher for one method, exported to ``file``."""
    dataset = open_split(args.data, split)
    classes = dataset.classes
    wide, box = kind(detector, method)
    torch.manual_seed(0)
    spec = ModelSpec(
        detector, "shufflenet_v2_x0_5", len(classes), fpn_channels=256 if wide else 32, tower_convs=0 if wide else 1,
        box=box, head_channels=64 if detector == "faster_rcnn" else None, bn="train",
    )  # fmt: skip
    made = build_detector(spec)
    atomic_save(export(made, classes, args.canvas, {}), file)
    plan = plan_store(
        CacheOptions(data=str(args.data), teacher=str(file), method="drkd_lite", split=split), NullReporter()
    )
    images = torch.stack([s.image for s in next(batches(plan, 2, 4))])
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the statistics of these images alone
    with torch.no_grad():
        made(images.float() / 255)
    made.eval()
    if isinstance(made, DenseDetector):
        spread(made, images)
    atomic_save(export(made, classes, args.canvas, {}), file)


def batches(plan: StorePlan, size: int, rows: int | None) -> Iterator[list[Sample]]:
    """Samples of one orientation, without entries, over ``rows`` evenly spaced rows of the plan (None: all)."""
    source = plan.source.with_regions(plan.source.region_spec, frozenset())
    total = plan.schema.rows
    chosen = [plan.item(row) for row in range(0, total, 1 if rows is None else max(1, total // rows))]
    for items in batches_by_orientation(source, chosen, size):
        yield [source.load(i) for i in items]


def with_entries(plan: StorePlan, sample: Sample) -> Sample:
    """``sample`` with the entries of the plan's own regions."""
    targets = plan.source.targets((plan.source.dataset.index_of(sample.key.image_id), sample.key.view))
    return replace(sample, assigned=targets.assigned, entries=targets.entries)


def dense_needs(stored: tuple[Need, ...], detector: Detector) -> tuple[Need, ...]:
    """What one would save of each image without a store: whole float32 outputs."""
    wanted = {Need(n.name, "all") for n in stored if n.name in detector.specs()}
    if any(n.name == RANK for n in stored):
        wanted |= {Need(CLS_LOGITS, "all"), Need(BOXES, "all")}
    if any(n.name == BOXES for n in stored):
        wanted.add(Need(BOXES, "all"))
    if any(n.name not in detector.specs() and n.name not in (RANK, BOXES, *BACKBONE) for n in stored):
        wanted.add(Need(FEATURES, "all"))  # RoI features
    return tuple(sorted(wanted))


def dense_bytes(plan: StorePlan, needs: tuple[Need, ...], valid: Tensor) -> tuple[int, int]:
    """Bytes of those float32 arrays: over the canvas, and over the image's own cells alone."""
    schema = replace(plan.schema, tensors=plan_tensors(needs, plan.teacher.forward.detector.specs(), "lossless"))
    whole = own = 0
    for tensor in schema.tensors:
        each = 4 * int(np.prod(tensor.dims))
        whole += schema.count(tensor) * each
        own += int(schema.valid_rows(tensor, valid).sum()) * each
    return whole, own


def check_saved(plan: StorePlan, outputs: Tensors, sample: Sample, needs: tuple[Need, ...], folder: Path) -> None:
    """Saves those arrays of one image as .npy files, and raises AssertionError when they are not of the size computed."""
    one = read(plan.teacher.forward.detector, outputs, needs, None, collate([sample], None).targets)
    file, total = folder / "one.npy", 0
    for need in needs:
        np.save(file, one[need.key].numpy())
        total += file.stat().st_size - 128  # numpy's header
    computed = dense_bytes(plan, needs, sample.valid)[0]
    assert total == computed, f"{needs} take {total} bytes saved, {computed} computed"


def packed(schema: StoreSchema, arrays: Mapping[str, Any]) -> dict[str, int]:
    """Bytes on the disk of each array of a row."""
    return {a.path: len(pack_chunk(arrays[a.path], a)) + INDEX_BYTES for a in schema.layout()}


def one_row(plan: StorePlan, outputs: Tensors, sample: Sample) -> tuple[tuple[int, ...], dict[str, int]]:
    """Entries, positives, raw bytes, bytes on the disk, dense bytes (canvas, own cells) of a row; bytes by array."""
    sample = with_entries(plan, sample)
    batch = collate([sample], None)
    detector = plan.teacher.forward.detector
    row = read(detector, outputs, plan.needs, batch.entries, batch.targets)
    value = {n.key: (row[n.key][0] if n.dense else row[n.key]).numpy() for n in plan.needs}
    arrays = encode_row(plan, sample, value)
    size = packed(plan.schema, arrays)
    count = positives = 0
    if sample.entries is not None:
        count, positives = len(sample.entries.index), int(sample.entries.select("main").sum())
    raw = sum(a.nbytes for a in arrays.values())
    dense = dense_bytes(plan, dense_needs(plan.needs, detector), sample.valid)
    return (count, positives, raw, sum(size.values()), *dense), size


def measure(args: argparse.Namespace, detector: str, methods: tuple[str, ...]) -> list[dict[str, Any]]:
    """All rows of both splits for one detector and methods that can share a teacher."""
    found: dict[str, list[tuple[int, ...]]] = {m: [] for m in methods}
    by_array: dict[str, Counter[str]] = {m: Counter() for m in methods}
    checked = False
    with tempfile.TemporaryDirectory() as folder:
        for split in (s for s in ("train", "val") if has_split(args.data, s)):
            teacher = args.teacher or str(Path(folder) / f"{split}.pt")
            if not args.teacher:
                make_teacher(args, detector, methods[0], split, Path(teacher))
            options = CacheOptions(
                data=str(args.data), teacher=teacher, split=split, canvas=args.canvas, micro_batch=MICRO_BATCH
            )
            plans = [plan_store(replace(options, method=m), NullReporter()) for m in methods]
            for samples in batches(plans[0], MICRO_BATCH, args.rows):
                outputs = plans[0].teacher.forward.outputs(torch.stack([s.image for s in samples]))
                for k, sample in enumerate(samples):
                    own = {name: value[k : k + 1] for name, value in outputs.items()}
                    for method, plan in zip(methods, plans, strict=True):
                        if not checked:
                            needs = dense_needs(plan.needs, plan.teacher.forward.detector)
                            check_saved(plan, own, sample, needs, Path(folder))
                        line, size = one_row(plan, own, sample)
                        found[method].append(line)
                        by_array[method].update(size)
                    checked = True
    return [summary(args, detector, m, np.array(found[m], np.float64), by_array[m]) for m in methods]


def summary(
    args: argparse.Namespace, detector: str, method: str, found: Any, by_array: Mapping[str, int]
) -> dict[str, Any]:
    """Means over rows, beside the limits."""
    entries, positives, raw, disk, dense, own = found.mean(axis=0)
    limit, least = LIMITS.get((detector, method)), TIMES.get(method, 4.0)
    if limit is not None and method in OF_FEATURES and args.teacher:
        limit *= load_detector(args.teacher)[0].spec.fpn_channels / 256
    return {
        "detector": detector,
        "method": method,
        "teacher": "fitted" if args.teacher else "untrained",
        "rows": len(found),
        "entries": entries,
        "positives": positives,
        "raw_bytes": raw,
        "disk_bytes": disk,
        "disk_bytes_p95": float(np.percentile(found[:, 3], 95)),
        "disk_bytes_by_array": {k: v / len(found) for k, v in by_array.items()},
        "dense_float32_bytes": dense,
        "dense_float32_bytes_of_own_cells": own,
        "times_smaller": dense / disk,
        "times_smaller_of_own_cells": own / disk,
        "limit_bytes": limit,
        "least_times": least,
        "met": bool((limit is None or disk <= limit) and dense / disk >= least),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = (
        "detector", "method", "rows", "entries", "kB a row", "95th percentile", "limit, kB", "dense fp32, kB",
        "times smaller", "of own cells", "at least", "met",
    )  # fmt: skip
    out = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for x in lines:
        limit = "" if x["limit_bytes"] is None else f"{x['limit_bytes'] / 1e3:,.0f}"
        out.append(
            f"| {x['detector']} | `{x['method']}` | {x['rows']} | {x['entries']:,.0f} | {x['disk_bytes'] / 1e3:,.1f} | "
            f"{x['disk_bytes_p95'] / 1e3:,.1f} | {limit} | {x['dense_float32_bytes'] / 1e3:,.0f} | "
            f"{x['times_smaller']:,.1f} | {x['times_smaller_of_own_cells']:,.1f} | {x['least_times']:.0f} | "
            f"{'yes' if x['met'] else '**no**'} |"
        )
    return "\n".join(out) + "\n"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--detector", default="gfl", help="any of gfl,atss,fcos,retinanet,faster_rcnn, or all")
    parser.add_argument("--methods", default="ld", help="any of " + ",".join(METHODS) + ", or all")
    parser.add_argument("--canvas", default="800x1344")
    parser.add_argument("--teacher", default="", help="a trained run instead of an untrained teacher")
    parser.add_argument("--rows", type=int, default=None, help="of each split; all by default")
    parser.add_argument("--table", type=Path, default=None)
    args = parser.parse_args()
    detectors = DETECTORS if args.detector == "all" else tuple(args.detector.split(","))
    if args.teacher:
        detectors = (load_detector(args.teacher)[0].spec.detector,)
    methods = METHODS if args.methods == "all" else tuple(args.methods.split(","))
    lines = []
    for detector in detectors:
        groups: dict[tuple[bool, str], list[str]] = {}
        for method in methods:
            if not (detector == "faster_rcnn" and method in DENSE_ONLY):
                groups.setdefault((False, "") if args.teacher else kind(detector, method), []).append(method)
        for group in groups.values():
            lines += measure(args, detector, tuple(group))
    if args.table:
        args.table.write_text(table(lines))
    print(json.dumps({"canvas": args.canvas, "lines": lines}, indent=1))


if __name__ == "__main__":
    main()
