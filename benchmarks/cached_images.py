"""What ``--cache-images`` costs and saves: kB an image by the way it is stored, and processor time to load a row.

Prints one JSON object. The ways are zstd level 1, as in the store, over several reversible transforms of the canvas, and
PNG and lossless WebP for comparison. For loading, a store with cached images and one without are written with the given
teacher; their rows are loaded in turn, batch by batch, in one process.

    python benchmarks/cached_images.py --data DATA --teacher RUN --out FOLDER [--method ld] [--canvas 256x320]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from PIL import Image

from kdcli.data.coco import open_split
from kdcli.data.images import read_image
from kdcli.data.views import Geometry, render, view_geometry
from kdcli.engine.caching.plan import plan_store
from kdcli.engine.caching.write import write_store
from kdcli.engine.loading.loader import Loader
from kdcli.engine.runtime.progress import NullReporter
from kdcli.engine.training import run_config
from kdcli.engine.training.run_folder import hardware
from kdcli.engine.training.setup import prepare
from kdcli.options import CacheOptions
from kdcli.store.arrays import ZSTD_LEVEL
from kdcli.store.image_codec import PIXELS, decode_pixels, encode_pixels
from kdcli.store.info import store_info
from kdcli.structures import Canvas

Pixels = NDArray[np.uint8]
T = TypeVar("T")


def rows_over(axis: int) -> tuple[Callable[[Pixels], Pixels], Callable[[Pixels], Pixels]]:
    """Differences along an axis of [3, H, W], and the way back."""

    def apart(x: Pixels) -> Pixels:
        return np.diff(x, axis=axis, prepend=np.zeros_like(x.take([0], axis)))

    def back(x: Pixels) -> Pixels:
        return np.add.accumulate(x, axis=axis, dtype=np.uint8, out=x)

    return apart, back


def transforms() -> dict[str, tuple[Callable[[Pixels], Pixels], Callable[[Pixels], Pixels]]]:
    """Name -> (canvas to codes, codes to canvas)."""
    up, left = rows_over(1), rows_over(2)
    return {
        "none": (lambda x: x, lambda x: x),
        "over the pixel to the left": left,
        "over the row above": up,
        "over both": (lambda x: left[0](up[0](x)), lambda x: up[1](left[1](x))),
        "over green, then over the row above": (
            lambda x: encode_pixels(x).reshape(x.shape),
            lambda x: decode_pixels(x.reshape(3, -1), (x.shape[1], x.shape[2])),
        ),
    }


def timed(work: Callable[..., T], *arguments: Any) -> tuple[float, T]:
    """Processor seconds, and what came of it."""
    started = time.process_time()
    made = work(*arguments)
    return time.process_time() - started, made


def pack(canvas: Pixels, apart: Callable[[Pixels], Pixels]) -> bytes:
    """A canvas as the store would keep it."""
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(apart(canvas).tobytes())


def unpack(packed: bytes, size: tuple[int, ...], back: Callable[[Pixels], Pixels]) -> Pixels:
    """The canvas again."""
    data = bytearray(zstandard.ZstdDecompressor().decompress(packed))
    return back(np.frombuffer(data, np.uint8).reshape(size))


def decoded(file: io.BytesIO) -> Pixels:
    """The canvas of an image file."""
    return np.ascontiguousarray(np.asarray(Image.open(file)).transpose(2, 0, 1))


def sizes(canvases: list[Pixels]) -> dict[str, dict[str, float]]:
    """Mean kB of a canvas, and milliseconds to write and to read it."""
    found = {}
    for name, (apart, back) in transforms().items():
        total = write = read = 0.0
        for canvas in canvases:
            seconds, packed = timed(pack, canvas, apart)
            write += seconds
            total += len(packed)

            seconds, canvas_again = timed(unpack, packed, canvas.shape, back)
            read += seconds
            assert np.array_equal(canvas_again, canvas)
        found[name] = shown(total, write, read, len(canvases))
    for name, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        total = write = read = 0.0
        for canvas in canvases:
            file = io.BytesIO()
            image = Image.fromarray(np.ascontiguousarray(canvas.transpose(1, 2, 0)))
            write += timed(partial(image.save, file, name, **options))[0]
            total += file.tell()
            read += timed(decoded, file)[0]
        found[name] = shown(total, write, read, len(canvases))
    return found


def shown(total: float, write: float, read: float, number: int) -> dict[str, float]:
    """Means over ``number`` canvases."""
    return {
        "kB": round(total / number / 1000, 1), "write_ms": round(write / number * 1000, 2),
        "read_ms": round(read / number * 1000, 2),
    }  # fmt: skip


def drawn_canvas(path: Path, geometry: Geometry) -> Pixels:
    """The canvas of a view, from its file."""
    pixels: Pixels = render(read_image(path, (geometry.height, geometry.width))[0], geometry).numpy()
    return pixels


def canvases_of(data: str, canvas: Canvas, number: int) -> tuple[list[Pixels], float, float]:
    """Canvases of evenly spaced images, mean kB of their files, and milliseconds from file to canvas."""
    dataset = open_split(Path(data), "train")
    made, files, seconds = [], 0, 0.0
    for position in range(0, dataset.num_images, max(1, dataset.num_images // number)):
        height, width = dataset.image_size(position)
        geometry = view_geometry(canvas, height, width, "identity", 0, dataset.image_id(position))
        path = dataset.image_path(position)
        took, drawn = timed(drawn_canvas, path, geometry)
        seconds += took
        made.append(drawn)
        files += path.stat().st_size
    return made, files / len(made) / 1000, seconds / len(made) * 1000


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """Rows a second and processor milliseconds a row, of the whole loader and with one data worker for training."""
    runs, written = {}, {}
    for name, cached in (("files", False), ("store", True)):
        store = args.out / name
        options = CacheOptions(
            data=args.data, teacher=args.teacher, method=args.method, canvas=args.canvas, cache_images=cached
        )
        started = time.perf_counter()
        if not store.exists():
            write_store(plan_store(options, NullReporter()), store, NullReporter())
        written[name] = round(time.perf_counter() - started, 1)
        fields = {"data": args.data, "cache": str(store), "method": args.method, "model": {"name": args.model}}
        request = run_config.from_flags("distill", fields, {}, None, {})
        runs[name] = prepare(request.options(), frozenset(fields), NullReporter())
    made = next(iter(runs.values()))
    items = [(int(p), v) for p in made.positions for v in made.views]
    groups: dict[tuple[int, int], list[tuple[int, str]]] = {}
    for item in items:
        groups.setdefault(made.source.geometry(item).canvas.size, []).append(item)
    plan = [g[k : k + 16] for g in groups.values() for k in range(0, len(g), 16)]
    loaders = {name: iter(Loader(run.source, 0).batches(plan * args.rounds)) for name, run in runs.items()}
    times: dict[str, list[tuple[float, float, int]]] = {name: [] for name in runs}
    for _ in plan * args.rounds:
        for name, batches in loaders.items():
            began = time.perf_counter()
            cpu, batch = timed(next, batches)
            times[name].append((time.perf_counter() - began, cpu, len(batch.keys)))
    found: dict[str, Any] = {"write_s": written}
    for name, taken in times.items():
        info = store_info(args.out / name)
        found[name] = {
            "rows_per_s": round(statistics.median(n / wall for wall, _, n in taken), 1),
            "cpu_ms_per_row": round(statistics.median(cpu / n for _, cpu, n in taken) * 1000, 2),
            "kB_a_row": round(info["bytes"] / info["rows"] / 1000, 1),
            "of_which_pixels": round(info["bytes_by_array"].get(PIXELS, 0) / info["rows"] / 1000, 1),
        }
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--canvas", default="256x320")
    parser.add_argument("--images", type=int, default=40, help="images whose canvases are stored in each way")
    parser.add_argument("--teacher", help="without it nothing is loaded, only the ways are compared")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--method", default="ld")
    parser.add_argument("--model", default="gfl_shufflenet_v2_x0_5")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    canvases, file_kb, file_ms = canvases_of(args.data, Canvas.parse(args.canvas), args.images)
    found: dict[str, Any] = {
        "machine": f"{hardware()}, {os.cpu_count()} cores", "canvas": args.canvas, "canvases": len(canvases),
        "file_kB": round(file_kb, 1), "file_to_canvas_ms": round(file_ms, 2), "ways": sizes(canvases),
    }  # fmt: skip
    if args.teacher:
        found["loading"] = loading(args)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
