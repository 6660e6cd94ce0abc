"""How many bytes a stored row takes on real boxes: writes a store with an untrained teacher and prints JSON.

The entries of LD and RM depend on the boxes alone, and how well 8-bit codes compress hardly depends on the weights, so
an untrained GFL on a small backbone says what a trained one would take.

    python benchmarks/row_size.py --data COCO [--method ld] [--canvas 800x1344]
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from kdcli.cache.reader import CacheReader
from kdcli.cache.schema import CacheSchema
from kdcli.cache.writer import read_journal, read_manifest
from kdcli.data.coco import has_split, open_split
from kdcli.detectors.build import ModelSpec, build_detector
from kdcli.detectors.weights import export
from kdcli.engine.caching import plan_store
from kdcli.engine.watch import Silent
from kdcli.engine.writing import write_store
from kdcli.files import atomic_save
from kdcli.options import CacheOptions
from kdcli.structures import RowKey


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--method", default="ld")
    parser.add_argument("--canvas", default="800x1344")
    args = parser.parse_args()
    rows: list[tuple[int, int, int]] = []  # entries, positives, raw bytes
    on_disk: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for split in (s for s in ("train", "val") if has_split(args.data, s)):
            dataset = open_split(args.data, split)
            classes = [{"id": c.id, "name": c.name} for c in dataset.classes]
            teacher = Path(folder) / f"teacher-{split}.pt"
            torch.manual_seed(0)
            spec = ModelSpec("gfl", "shufflenet_v2_x0_5", len(classes), fpn_channels=32, tower_convs=1)
            atomic_save(export(build_detector(spec), classes, args.canvas, {}), teacher)
            store = Path(folder) / f"store-{split}"
            options = CacheOptions(data=str(args.data), teacher=str(teacher), method=args.method, split=split)
            plan = plan_store(options, Silent())
            write_store(plan, store, Silent())
            schema = CacheSchema.from_json(read_manifest(store)["schema"])
            for entry in read_journal(store).values():
                for path, file in entry["files"].items():
                    on_disk[path] = on_disk.get(path, 0) + file["bytes"]
            reader = CacheReader(store)
            for image_id in dataset.annotations.image_ids.tolist():
                for view in reader.views:
                    row = reader.read(RowKey(image_id, view))
                    count = 0 if row.entries is None else len(row.entries.index)
                    main = 0 if row.entries is None else int(row.entries.select("main").sum())
                    entry_bytes = 11 * count if schema.sparse else 0  # index 4, flag 1, gt 2, weight 4
                    rows.append(
                        (count, main, sum(a.nbytes for a in row.arrays.values()) + entry_bytes + 140)
                    )  # identity, geometry, count
    table = np.array(rows)
    print(
        json.dumps(
            {
                "rows": len(rows),
                "classes": len(classes),
                "canvas": args.canvas,
                "method": args.method,
                "entries_mean": float(table[:, 0].mean()),
                "positives_mean": float(table[:, 1].mean()),
                "raw_bytes_mean": float(table[:, 2].mean()),
                "raw_bytes_p95": float(np.percentile(table[:, 2], 95)),
                "disk_bytes_mean": sum(on_disk.values()) / len(rows),
                "disk_bytes_mean_by_array": {k: v / len(rows) for k, v in on_disk.items()},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
