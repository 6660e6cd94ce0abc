"""``cache-teacher``: runs the teacher once over every (image, view) and writes what the methods read.

Rows are computed shard by shard; inside a shard they are grouped by orientation and cut into micro-batches of a
recorded size, so that a row's numbers do not depend on where a killed run was taken up again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcli.cache.fidelity import ErrorMeter
from kdcli.cache.plan import plan_tensors, shard_rows_for
from kdcli.cache.reader import compare_manifests
from kdcli.cache.schema import CacheSchema, regions_of, row_tensor
from kdcli.cache.schema import (
    collate as collate_rows,
)
from kdcli.cache.writer import StoreWriter, create_store, read_manifest, sole_writer
from kdcli.data.coco import Dataset, has_split, open_split
from kdcli.data.views import parse_views
from kdcli.detectors.build import lineage_of
from kdcli.detectors.read import AT_PROPOSALS
from kdcli.detectors.weights import load_detector
from kdcli.engine.devices import pick_device, pick_workers, set_threads
from kdcli.engine.evaluate import evaluate, validation_source
from kdcli.engine.manifest import make_manifest, region_spec, teacher_entry, with_classes
from kdcli.engine.prepare import absolute_methods, usable
from kdcli.engine.samples import Item, Loader, Sample, SampleSource, collate, orientation
from kdcli.engine.teacher import TeacherForward, class_order
from kdcli.engine.watch import Watcher
from kdcli.errors import GateError, StoreError
from kdcli.geometry.regions import guard
from kdcli.methods import find_methods
from kdcli.methods.base import Pair, check_pair, resolve_options
from kdcli.options import CacheOptions
from kdcli.structures import Canvas
from kdcli.tensors import Need

MANIFEST_IDENTITY = (
    "teacher",
    "teacher_run",
    "dataset",
    "class_order",
    "canvas",
    "views",
    "view_seed",
    "assigner",
    "regions",
)


@dataclass(frozen=True)
class Plan:
    """A store that could be written: the teacher, the samples, the schema and the manifest."""

    options: CacheOptions
    forward: TeacherForward
    source: SampleSource
    positions: NDArray[np.int64]
    views: tuple[str, ...]
    schema: CacheSchema
    needs: tuple[Need, ...]
    manifest: dict[str, Any]  # its teacher.ap may still be None
    device: torch.device
    workers: int

    def item(self, row: int) -> Item:
        """Image and view of a row: the views of an image lie side by side."""
        position, view = divmod(row, len(self.views))
        return int(self.positions[position]), self.views[view]


def plan_store(options: CacheOptions, watcher: Watcher) -> Plan:
    """Everything about a store but its rows; reads the annotations and the teacher, writes nothing."""
    threads = set_threads(options.threads)
    device = pick_device(options.device)
    detector, meta = load_detector(options.teacher)
    dataset = open_split(Path(options.data), options.split)
    order = class_order([c["name"] for c in meta.classes], [c.name for c in dataset.classes])
    specs = with_classes(detector.specs(), len(order))
    canvas = Canvas.parse(options.canvas or meta.canvas)
    views = parse_views(options.views)
    methods = find_methods(options.method)
    lineage = lineage_of(detector.spec.detector)
    pair = Pair(specs, specs, detector.grid, canvas, lineage[-1])
    resolved = {}
    for name, method in methods.items():
        resolved[name] = resolve_options(name, method, lineage, options.methods.get(name, {}), detector.region_defaults)
        check_pair(name, method, resolved[name], pair, detector.spec.name, detector.spec.name)
    needs: tuple[Need, ...] = tuple(sorted({n for k, m in methods.items() for n in m.reads(resolved[k])}))
    positions = usable(dataset, options.skip_bad, watcher)
    source = SampleSource(
        dataset, canvas, options.view_seed, detector.grid, detector.assigner,
        region_spec(detector.region_defaults, methods, resolved), regions_of(needs),
    )  # fmt: skip
    schema = CacheSchema(
        detector.grid, canvas, len(positions) * len(views), 1, plan_tensors(needs, specs, options.encoding),
        max_boxes=max((len(dataset.training_boxes(int(p))[0]) for p in positions), default=0),
    )  # fmt: skip
    row_bytes = sum(a.row_bytes for a in schema.layout())
    schema = replace(schema, shard_rows=min(options.shard_rows or shard_rows_for(row_bytes), schema.rows))
    run = {
        "precision": options.precision,
        "micro_batch": options.micro_batch,
        "device": device.type,
        "threads": threads if device.type == "cpu" else None,
    }
    left_out = sorted(dataset.image_id(i) for i in set(range(dataset.num_images)) - set(positions.tolist()))
    teacher = teacher_entry(detector, meta.weights_sha256, None)
    manifest = make_manifest(source, views, teacher, run, order, left_out=left_out)
    # for messages and `cache show`: where the store came from, not what it is
    origin = {"data": str(Path(options.data).resolve()), "teacher": str(Path(options.teacher).resolve())}
    manifest |= {"methods": absolute_methods(options.method), "method_options": resolved, "origin": origin}
    detector = detector.to(device).to(memory_format=torch.channels_last)
    return Plan(
        options, TeacherForward(detector.eval(), order, options.micro_batch, options.precision), source, positions,
        views, schema, needs, manifest, device, pick_workers(options.workers),
    )  # fmt: skip


def write_store(plan: Plan, out: Path, watcher: Watcher) -> int:
    """Write what is missing of the store at ``out``; returns how many rows were written in this call.

    An existing store is continued if it is the same one, else StoreError lists the fields that differ; also when another
    process is writing it.
    """
    if out.exists():
        stored = read_manifest(out)
        ours = {k: plan.manifest[k] for k in MANIFEST_IDENTITY} | {"schema": _by_name(plan.schema.to_json())}
        stored["schema"] = _by_name(stored["schema"])
        ours["teacher"] = {k: v for k, v in ours["teacher"].items() if k != "ap"}
        differences = compare_manifests(ours, stored)
        if differences:
            raise StoreError(
                f"'{out}' is another store: {'; '.join(differences)}; choose another --out, or delete it first"
            )
        require_able(stored["teacher"]["ap"], plan.options.min_teacher_ap)
    else:
        manifest = {**plan.manifest, "teacher": {**plan.manifest["teacher"], "ap": measure_teacher(plan, watcher)}}
        create_store(out, plan.schema, manifest, plan.source.dataset.annotations.image_ids[plan.positions])
    with sole_writer(out):
        return _write_rows(plan, out, watcher)


def _write_rows(plan: Plan, out: Path, watcher: Watcher) -> int:
    writer = StoreWriter(out, plan.schema)
    done = writer.done()
    todo = [s for s in range(plan.schema.num_shards) if s not in done]
    ranges = {s: plan.schema.shard_range(s) for s in range(plan.schema.num_shards)}
    watcher.stage("cache-teacher", plan.schema.rows)
    watcher.advance(sum(ranges[s][1] - ranges[s][0] for s in done))
    loader = Loader(plan.source, plan.workers)
    chunks = {s: _chunks(plan, *ranges[s]) for s in todo}
    samples = loader.samples([c for s in todo for c in chunks[s]])
    written, started, size = 0, time.perf_counter(), 0
    for shard in todo:
        meter = ErrorMeter()
        precision_meter = ErrorMeter()
        rows: dict[tuple[int, str], dict[str, NDArray[Any]]] = {}
        for chunk in chunks[shard]:
            first = not rows
            batch = next(samples)
            rows.update(zip(chunk, _encode_chunk(plan, batch, meter, precision_meter if first else None), strict=True))
            written += len(chunk)
            speed = written / (time.perf_counter() - started)
            watcher.advance(len(chunk), f"{speed:.1f} rows/s, {size / 2**20:.1f} MB")
        ordered = [rows[plan.item(r)] for r in range(*ranges[shard])]
        measured = {"encoding": meter.sums, "precision": precision_meter.sums}
        size += writer.write_shard(shard, ordered, measured)
    return written


def _by_name(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema's JSON with the tensors under their names, so that a difference can be read."""
    tensors = {f"{t['name']}@{t['region']}": t["encoding"]["name"] for t in schema["tensors"]}
    return {**schema, "tensors": ", ".join(f"{k} {v}" for k, v in sorted(tensors.items()))}


def measure_teacher(plan: Plan, watcher: Watcher) -> float | None:
    """The teacher's AP on the val split (None without one), which the manifest keeps.

    Raises GateError when it is below ``min_teacher_ap``.
    """
    root = Path(plan.options.data)
    if not has_split(root, "val"):
        watcher.note("no val split: the teacher's AP is not measured")
        return None
    val: Dataset = open_split(root, "val")
    keep = set(usable(val, plan.options.skip_bad, watcher).tolist())
    watcher.stage("teacher AP", len(keep))
    source = validation_source(val, plan.forward.detector, plan.source.canvas)
    found = evaluate(
        plan.forward.detector, val, plan.source.canvas, device=plan.device, batch=plan.forward.micro_batch,
        loader=Loader(source, plan.workers), forward=plan.forward.outputs, relabel=plan.forward.relabel,
        left_out=frozenset(range(val.num_images)) - keep, advance=watcher.advance,
    )  # fmt: skip
    ap = found.metrics.ap
    watcher.note(f"teacher AP on val: {'not defined' if ap is None else f'{ap:.1f}'}")
    require_able(ap, plan.options.min_teacher_ap)
    return ap


def require_able(ap: float | None, least: float) -> None:
    """Raises GateError when a measured AP is below ``--min-teacher-ap``: a teacher that knows nothing teaches nothing."""
    if ap is not None and ap < least:
        raise GateError(
            f"the teacher has {ap:.1f} AP on val, below --min-teacher-ap {least:g}; nothing was written. Check its "
            "canvas and classes, or lower the gate"
        )


def _chunks(plan: Plan, start: int, stop: int) -> list[list[Item]]:
    """The micro-batches of a shard: rows in order, grouped by orientation."""
    buckets: dict[str, list[Item]] = {}
    for row in range(start, stop):
        item = plan.item(row)
        buckets.setdefault(str(orientation(plan.source, item).size), []).append(item)
    size = plan.forward.micro_batch
    return [b[k : k + size] for b in buckets.values() for k in range(0, len(b), size)]


def encode_rows(
    plan: Plan, samples: list[Sample], proposals: list[Tensor] | None = None
) -> tuple[list[dict[str, NDArray[np.float32]]], list[dict[str, Any]]]:
    """Teacher tensors (float32, by ``Need.key``) of samples of one orientation, and their stored arrays by path.

    ``proposals``: see TeacherForward.rows.
    """
    batch = collate(samples, None).to(plan.device)
    values = [
        {need.key: row_tensor(row[need.key][0] if need.dense else row[need.key]) for need in plan.needs}
        for row in plan.forward.rows(batch.images, batch.targets, batch.entries, plan.needs, proposals)
    ]
    rows = []
    for sample, value in zip(samples, values, strict=True):
        identity = sample.content_hash + guard(sample.boxes, sample.labels, plan.source.definition)
        arrays: dict[str, Any] = {
            "row/identity": np.frombuffer(identity, np.uint8).copy(),
            "row/geometry": sample.geometry.to_array(),
        }
        if sample.entries is not None:
            entries = sample.entries
            arrays["entries/count"] = np.array([len(entries.index)], np.int32)
            arrays["entries/index"] = entries.index.numpy().astype(np.int32)
            arrays["entries/flag"] = entries.flag.numpy()
            arrays["entries/gt"] = entries.gt.numpy().astype(np.int16)
            arrays["entries/weight"] = entries.weight.numpy()
        counts = {t.count: len(value[t.need.key]) for t in plan.schema.tensors if t.count and not t.need.at_entries}
        arrays.update({str(path): np.array([count], np.int32) for path, count in counts.items()})
        arrays.update(plan.schema.encode(value, sample.valid.numpy()))
        rows.append(arrays)
    return values, rows


def _encode_chunk(
    plan: Plan, samples: list[Sample], meter: ErrorMeter, precision_meter: ErrorMeter | None
) -> list[dict[str, Any]]:
    values, rows = encode_rows(plan, samples)
    for sample, value, row in zip(samples, values, rows, strict=True):
        decoded = plan.schema.decode(collate_rows([row], plan.schema.layout()), plan.needs)
        _compare(plan, sample, meter, value, {k: row_tensor(v) for k, v in decoded.items()})
    if precision_meter is not None and plan.forward.precision != "fp32":
        exact_plan = replace(plan, forward=replace(plan.forward, precision="fp32"))
        boxes = AT_PROPOSALS[0].key
        same = [torch.from_numpy(v[boxes]).to(plan.device) for v in values] if boxes in values[0] else None
        exact, _ = encode_rows(exact_plan, samples, same)
        for sample, reference, value in zip(samples, exact, values, strict=True):
            _compare(plan, sample, precision_meter, reference, value)
    return rows


def _compare(
    plan: Plan, sample: Sample, meter: ErrorMeter, exact: Mapping[str, NDArray[np.float32]],
    other: Mapping[str, NDArray[np.float32]],
) -> None:  # fmt: skip
    """Add the error of one row; cells that no loss reads do not count."""
    for tensor in plan.schema.tensors:
        key = tensor.need.key
        theirs = other[key][0] if other[key].ndim > exact[key].ndim else other[key]
        keep: Any = slice(None)
        if tensor.need.dense:
            keep = plan.schema.valid_rows(tensor, sample.valid).numpy()
        meter.add(key, exact[key][keep], theirs[keep])
