"""What each encoding of each tensor costs and saves, on a real teacher and a trained student: JSON and a plot.

For every method and every tensor that it reads, that tensor alone is encoded and decoded; the method's loss and its gradient
at the same student weights are compared with those of float32, row by row of the data set, in batches.

    python benchmarks/encodings.py --data DATA --teacher RUN --student RUN --methods ld,rm,pfi --rows 64 --plot FILE.png
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcli.detectors.build import family_of
from kdcli.detectors.weights import load_detector
from kdcli.engine.caching.plan import StorePlan, plan_store
from kdcli.engine.caching.write import encode_row
from kdcli.engine.loading.region_check import spread
from kdcli.engine.loading.samples import Sample, collate
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training.step import TrainStep
from kdcli.methods import METHODS
from kdcli.methods.base import Pair
from kdcli.methods.resolve import resolve_options
from kdcli.options import CacheOptions
from kdcli.store import encodings
from kdcli.store.arrays import StoredTensor
from kdcli.store.batch_buffers import collate_arrays
from kdcli.store.encodings import ChannelAffine, Encoding, Float, LogOdds8, VectorAffine
from kdcli.store.schema import StoreSchema
from kdcli.store.shards import pack_chunk
from kdcli.structures import Batch
from kdcli.tensors import BACKBONE, BOX_DISTRIBUTION, BOXES, CLS_LOGITS, FEATURES, Tensors

BITS = (8, 7, 6, 5, 4)


def candidates(tensor: StoredTensor) -> list[Encoding]:
    """The encodings that fit a tensor."""
    found: list[Encoding] = [Float("float16")]
    name, dense = tensor.need.name, tensor.need.dense
    if name == BOX_DISTRIBUTION or ((name == FEATURES or name in BACKBONE) and not dense):
        found += [VectorAffine(b) for b in BITS]
    elif name == FEATURES or name in BACKBONE:
        found += [ChannelAffine(b) for b in BITS]
    elif name == CLS_LOGITS:
        found += [LogOdds8()]
    elif name == BOXES and dense:
        found += [encodings.Box16()]
    return found


def batches(plan: StorePlan, rows: int) -> list[tuple[list[Sample], list[dict[str, Any]]]]:
    """Samples and their exact teacher tensors."""
    items = spread(plan.positions, plan.views, rows)
    size = plan.teacher.forward.micro_batch
    by_size: dict[str, list[Sample]] = {}
    for item in items:
        sample = plan.source.load(item)
        by_size.setdefault(str(sample.geometry.canvas.size), []).append(sample)
    groups = [g[k : k + size] for g in by_size.values() for k in range(0, len(g), size)]
    return [(g, plan.teacher.rows(g, plan.needs)) for g in groups]


def through(
    plan: StorePlan, schema: StoreSchema, samples: list[Sample], values: list[dict[str, Any]]
) -> tuple[Tensors, dict[str, int]]:
    """Teacher tensors after encoding and decoding with ``schema``, and the compressed bytes of each tensor."""
    coded = plan.with_schema(schema)
    rows = [encode_row(coded, s, v) for s, v in zip(samples, values, strict=True)]
    size = {
        t.need.key: sum(len(pack_chunk(r[a.path], a)) for a in schema.tensor_arrays(t).values() for r in rows)
        for t in schema.tensors
    }
    return schema.decode(collate_arrays(rows, schema.layout()), plan.needs), size


def gradients(step: TrainStep, batch: Batch, teacher: Tensors) -> tuple[dict[str, float], Tensor]:
    """Each distillation term, and the gradient of their sum for the student's weights."""
    step.zero_grad()
    terms = step(batch, teacher)[1]
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    parts = [p.grad.flatten().double() for p in step.student.parameters() if p.grad is not None]
    return {k: float(v.detach()) for k, v in terms.items()}, torch.cat(parts)


def measure(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """One line for each tensor and encoding of a method."""
    options = CacheOptions(
        data=args.data, teacher=args.teacher, method=name, canvas=args.canvas, encoding="lossless", split=args.split
    )
    plan = plan_store(options, NullReporter())
    student = load_detector(args.student)[0].train()
    detector = plan.teacher.forward.detector
    pair = Pair(student.specs(), detector.specs(), student.grid, plan.source.canvas, family_of(student.spec.detector))
    torch.manual_seed(0)  # adapters
    resolved = resolve_options(name, METHODS[name], student.spec.detector, {})
    step = TrainStep(student, {name: METHODS[name](pair, **resolved)}, None)
    for module in step.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()  # the same statistics each time
    lines: dict[tuple[str, str], list[Any]] = {}
    for samples, values in batches(plan, args.rows):
        batch = collate(samples, None)
        exact, size = through(plan, plan.schema, samples, values)
        reference, direction = gradients(step, batch, exact)
        for tensor in plan.schema.tensors:
            raw = size[tensor.need.key]
            for encoding in candidates(tensor):
                changed = replace(
                    plan.schema,
                    tensors=tuple(replace(t, encoding=encoding) if t is tensor else t for t in plan.schema.tensors),
                )
                teacher, coded = through(plan, changed, samples, values)
                terms, gradient = gradients(step, batch, teacher)
                error = {k: abs(terms[k] / v - 1) for k, v in reference.items() if v}
                cosine = float(torch.nn.functional.cosine_similarity(gradient, direction, dim=0))
                lines.setdefault((tensor.need.key, encoding.to_json()["name"]), []).append(
                    (len(samples), coded[tensor.need.key], raw, error, cosine)
                )
    return [summary(name, key, encoding, found) for (key, encoding), found in lines.items()]


def summary(method: str, tensor: str, encoding: str, found: list[Any]) -> dict[str, Any]:
    """Means and worst cases over batches."""
    rows = sum(f[0] for f in found)
    terms = {k for f in found for k in f[3]}
    return {
        "method": method,
        "tensor": tensor,
        "encoding": encoding,
        "bytes_a_row": sum(f[1] for f in found) / rows,
        "float32_bytes_a_row": sum(f[2] for f in found) / rows,  # compressed too
        "loss_error": {k: float(np.mean([f[3].get(k, 0.0) for f in found])) for k in sorted(terms)},
        "loss_error_worst": max(max(f[3].values(), default=0.0) for f in found),
        "gradient_cosine_least": min(f[4] for f in found),
    }


def plot(lines: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Bytes against the error of the gradient, one line a method and tensor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["method"], line["tensor"]), []).append(line)
    for (method, tensor), found in groups.items():
        ordered = sorted(found, key=lambda f: f["bytes_a_row"])
        x = [f["bytes_a_row"] / 1000 for f in ordered]
        y = [max(1e-9, 1 - f["gradient_cosine_least"]) for f in ordered]
        axes.plot(x, y, marker="o", label=f"{method}: {tensor}")
    axes.set(xscale="log", yscale="log", xlabel="kB a row on disk", ylabel="1 - gradient cosine, worst batch")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=110)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--methods", default="ld,rm,pfi,bckd,defeat,defeat_thin,cwd,pkd,fgd")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--canvas", default=None)
    parser.add_argument("--split", default="train")
    parser.add_argument("--plot", type=Path, default=None)
    args = parser.parse_args()
    lines = [line for name in args.methods.split(",") for line in measure(args, name)]
    if args.plot:
        plot(lines, args.plot)
    print(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
