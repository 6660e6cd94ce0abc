"""kdcli's store beside the ways teacher outputs are kept today: bytes, writing, reading, training step, memory.

One run measures plain training, a live teacher, the store (read by kdcli and by zarr-python) and dense files: one ``.npy``
or ``.pt`` an image, one HDF5 file, fp16 safetensors shards. Prints one JSON object and writes one table. What is compared
takes turns, so that a noisy machine disturbs all alike; peak memory is measured in a process for each.

    python benchmarks/stores.py --out FOLDER [--data DATA --teacher RUN] [--canvas 800x1344 --rows 32 --batch 2]

``--out`` is where everything is written: a folder on the disk that is to be measured. Without --data it draws a data set,
without --teacher it makes a random one. On a GPU:

    python benchmarks/stores.py --out FOLDER --device cuda --canvas 800x1344 --teacher-model gfl_resnet101 \\
      --model gfl_resnet50 --teacher-channels 256 --channels 256 --towers 4
"""

from __future__ import annotations

import os

from kdcli.store.encoding_error import Measured

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import stores_reading as reading
import torch
from common import draw_data, machine, part_of, random_teacher
from stores_formats import FORMATS, Dense, DenseRows, dense_shapes, gather
from stores_steps import compare, endless, make_trainer, median_ratio, steps
from stores_table import table, targets

from kdcli.engine.caching.plan import StorePlan, plan_store
from kdcli.engine.caching.write import encode_row
from kdcli.engine.loading.samples import Sample
from kdcli.engine.runtime.device import pick_device
from kdcli.engine.runtime.memory import peak_memory_bytes, reset_peak_memory
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.teacher.specs import specs_of
from kdcli.files import atomic_write_text
from kdcli.options import CacheOptions
from kdcli.store.encoding_policy import plan_tensors
from kdcli.store.reader import StoreReader
from kdcli.store.writer import StoreWriter, create_store
from kdcli.structures import RowKey

METHODS = ("ld", "pfi")
WRITE_ROUNDS = 3
MEMORY_STEPS = 6
HERE = [kind for kind, f in FORMATS.items() if f.lacking is None]


def main() -> None:
    """See the module."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only:
        only(args)
        return
    args.data, args.teacher = inputs(args)
    found: dict[str, Any] = {method: measure(args, method) for method in METHODS}
    times: dict[str, Any] = {}
    if args.steps:
        times = compare({n: trainer_of(args, n, 1) for n in variants()}, args.rounds, args.steps)
    memory = {n: memory_of(args, n) for n in times}
    for name, seconds in times.items():
        method, _, kind = name.rpartition(" ")
        for m in [method] if method else METHODS:
            found[m].setdefault(kind, {}).update(
                step_ms=1000 * float(np.median(seconds[:, 0])),
                step_over_plain=median_ratio(seconds[:, 0], times["plain"][:, 0]),
                step_cpu_ms=1000 * float(np.median(seconds[:, 1])),
                step_cpu_over_plain=median_ratio(seconds[:, 1], times["plain"][:, 1]),
                peak_mb=memory[name] / 2**20,
                peak_over_plain=memory[name] / memory["plain"],
            )
    for method in METHODS:
        found[method] |= {kind: {"lacking": f.lacking} for kind, f in FORMATS.items() if f.lacking}
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "table", "only", "data", "teacher")}
    # by processor time on a CPU, whose cores others may share; on a GPU by the clock, since waiting for it is the cost
    clock = "" if pick_device(args.device).type == "cuda" else "_cpu"
    result = {"methods": found, "clock": clock, "settings": settings, **machine()}
    result["targets"] = targets(result)
    atomic_write_text(args.table or args.out / "stores.md", table(result))
    print(json.dumps(result, indent=1))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "kdcli-stores")
    parser.add_argument("--table", type=Path, default=None, help="Markdown file; OUT/stores.md by default")
    parser.add_argument("--data", default="")
    parser.add_argument("--teacher", default="")
    parser.add_argument("--teacher-model", default="gfl_mobilenet_v2")
    parser.add_argument("--teacher-channels", type=int, default=128)
    parser.add_argument("--model", default="gfl_shufflenet_v2_x0_5")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--towers", type=int, default=2)
    parser.add_argument("--canvas", default="256x320")
    parser.add_argument("--rows", type=int, default=128, help="two for each image: as it is, and flipped")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--amp", default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="in each turn; 0: no step times and no memory")
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def inputs(args: argparse.Namespace) -> tuple[str, str]:
    """Data folder, of as many images as give ``args.rows`` rows in two views, and teacher checkpoint."""
    images = max(1, args.rows // 2)
    data = part_of(args.data, args.out, images, val=True) if args.data else draw_data(args.out, images)
    made = (args.out, data, args.teacher_model, args.teacher_channels, args.canvas)
    return data, args.teacher or random_teacher(*made)


def variants() -> list[str]:
    """The trainings: ``plain``, and for each method ``METHOD KIND``."""
    return ["plain", *(f"{m} {kind}" for m in METHODS for kind in ("live", "kdcli", *HERE))]


def folder_of(args: argparse.Namespace, method: str, kind: str) -> Path:
    """Where a format keeps the rows of a method."""
    out: Path = args.out
    return out / method / (FORMATS[kind].files or kind if kind in FORMATS else kind)


def dense_rows(args: argparse.Namespace, method: str, kind: str) -> DenseRows:
    """The dense files of a method, with what the store beside them says of its rows."""
    reader = StoreReader(folder_of(args, method, "kdcli"))
    needs = [t.need for t in reader.schema.tensors]
    schema = replace(reader.schema, tensors=plan_tensors(needs, specs_of(reader.manifest), "lossless"))
    numbers = {k: reader.row_index(k) for i in reader.image_ids for k in (RowKey(i, v) for v in reader.views)}
    return DenseRows(kind, folder_of(args, method, kind), schema, numbers)


def trainer_of(args: argparse.Namespace, name: str, workers: int) -> Any:
    """The trainer of a variant."""
    method, _, kind = name.rpartition(" ")
    rows = dense_rows(args, method, kind) if kind in FORMATS else None
    return make_trainer(args, method, kind, folder_of(args, method, "kdcli"), rows, workers)


def measure(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Writing and reading of one method, by kind."""
    device = pick_device(args.device)
    plan = plan_store(
        CacheOptions(
            data=args.data, teacher=args.teacher, method=method, canvas=args.canvas, device=args.device, micro_batch=1
        ),
        NullReporter(),
    )
    items = [plan.item(r) for r in range(plan.schema.rows)]
    samples = [plan.source.load(item) for item in items]
    dense = [outputs_of(plan, sample, device) for sample in samples]
    found = write_all(args, method, plan, samples, dense)
    entries = {s.key: s.entries for s in samples}
    needs, keys = plan.needs, [s.key for s in samples]
    store = folder_of(args, method, "kdcli")
    readings = {"kdcli": reading.by_kdcli(store, needs), "zarr": reading.by_zarr(store, needs)}
    for kind in HERE:
        rows = dense_rows(args, method, kind)
        readings[kind] = reading.by_format(kind, rows.folder, rows.schema, rows.numbers, entries, needs)
    check(readings, samples[: args.batch], device)
    del dense, samples
    fast = reading.warm(readings, keys, args.batch, args.rounds, device)
    slow = reading.cold(readings, keys, args.batch, device)
    for kind in readings:
        found.setdefault(kind, {}).update(
            read_warm={rate: statistics.median(values) for rate, values in fast[kind].items()},
            kdcli_over_this={rate: median_ratio(fast["kdcli"][rate], v) for rate, v in fast[kind].items()},
            read_cold=slow[kind]["rows_per_s"],
            pages_left_when_cold=slow[kind]["resident"],
        )
    found["kdcli"]["profile"] = reading.profile(readings["kdcli"], keys, args.batch, device)
    found["rows"] = {
        "rows": len(keys),
        "regions_ms": regions_ms(plan, items) if plan.source.regions else 0.0,
        "entries": statistics.mean(0 if e is None else len(e.index) for e in entries.values()),
    }
    return found


def outputs_of(plan: StorePlan, sample: Sample, device: torch.device) -> Dense:
    """What the teacher says at every cell of one image, in memory."""
    found = plan.teacher.forward.outputs(sample.image[None].to(device))
    return {name: found[name][0].cpu().contiguous().numpy() for name in dense_shapes(plan.schema)}


def write_all(
    args: argparse.Namespace, method: str, plan: StorePlan, samples: Sequence[Sample], dense: Sequence[Dense]
) -> dict[str, Any]:
    """Rows/s of writing from tensors in memory (until the call returns, and until all is on the disk), and bytes a row."""
    writers: dict[str, Callable[[Path, Sequence[Dense]], None]] = {
        kind: FORMATS[kind].write for kind in HERE if not FORMATS[kind].files
    }
    writers["kdcli"] = lambda folder, rows: write_kdcli(plan, folder, samples, rows)
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in writers}
    for _ in range(WRITE_ROUNDS):
        for kind, write in writers.items():
            folder = folder_of(args, method, kind)
            shutil.rmtree(folder, ignore_errors=True)
            if kind == "kdcli":  # its empty arrays take the same time however many rows there are
                ids = plan.source.dataset.annotations.image_ids[plan.positions]
                create_store(folder, plan.manifest, ids)
            else:
                folder.mkdir(parents=True)
            began = time.perf_counter()
            write(folder, dense)
            returned = time.perf_counter()
            reading.synced(folder)
            seconds[kind].append((returned - began, time.perf_counter() - began))
    return {
        kind: {
            "kb_a_row": reading.bytes_of(folder_of(args, method, kind)) / len(dense) / 1000,
            "write": len(dense) / statistics.median(s[0] for s in spent),
            "write_on_disk": len(dense) / statistics.median(s[1] for s in spent),
        }
        for kind, spent in seconds.items()
    }


def write_kdcli(plan: StorePlan, store: Path, samples: Sequence[Sample], dense: Sequence[Dense]) -> None:
    """Pick, encode, compress and write all rows, in this thread; each shard is on the disk when the next one begins."""
    writer = StoreWriter(store, plan.schema)
    for shard in range(plan.schema.num_shards):
        rows = range(*plan.schema.shard_range(shard))
        arrays = [encode_row(plan, samples[r], gather(plan.schema, dense[r], samples[r].entries)) for r in rows]
        writer.write_shard(shard, arrays, Measured())


def check(readings: dict[str, reading.Reading], samples: Sequence[Sample], device: torch.device) -> None:
    """Asserts that all read the same: both readers of the store exactly, the float32 files too, fp16 and 8 bits closely."""
    keys = [s.key for s in samples]
    got = {kind: r.ready(r.open(), keys, device)[0] for kind, r in readings.items()}
    valid = torch.stack([s.valid for s in samples]).to(device)
    for tensor in readings["npy"].schema.tensors:
        key = tensor.need.key
        exact = got["npy"][key]
        assert torch.equal(got["kdcli"][key], got["zarr"][key]), key
        for kind in (k for k in HERE if k != "safetensors"):
            assert torch.equal(got[kind][key], exact), (kind, key)
        keep = readings["npy"].schema.valid_rows(tensor, valid) if tensor.need.dense else ...
        for kind in {"kdcli", "safetensors"} & got.keys():
            worst = float((got[kind][key][keep] - exact[keep]).abs().max())
            # half a step of 8 bits over the range; of the log-odds over 20
            assert worst < 0.005 * float(exact.max() - exact.min()) + 0.05, (kind, key, worst)


def regions_ms(plan: StorePlan, items: Sequence[Any]) -> float:
    """Processor time of computing the regions of a row, which whoever trains from dense files does at every load."""
    plain = replace(plan.source, regions=frozenset(), detection_loss=True)
    difference = []
    for item in items[:32]:
        began = time.process_time()
        plain.load(item)
        middle = time.process_time()
        plan.source.load(item)
        difference.append(time.process_time() - middle - (middle - began))
    return 1000 * float(np.median(difference))


def memory_of(args: argparse.Namespace, name: str) -> int:
    """Peak memory of a variant in a process of its own, which also reads its data."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--data", args.data, "--teacher", args.teacher]
    command += ["--out", str(args.out)]
    return int(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)["peak"])


def only(args: argparse.Namespace) -> None:
    """Print the peak memory of one variant."""
    device = pick_device(args.device)
    reset_peak_memory(device)  # a child starts with its parent's peak
    trainer = trainer_of(args, args.only, 0)
    steps(trainer, endless(trainer), MEMORY_STEPS)
    print(json.dumps({"peak": peak_memory_bytes(device)}))


if __name__ == "__main__":
    main()
