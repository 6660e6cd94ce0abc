"""How small and how fast other lossless codecs hold the chunks of a real store: prints JSON, writes a table.

Each chunk (one row of one array, padding and all) is read with zarr, compressed and decompressed by every codec in turn, and
compared. Times are CPU seconds of one thread, so that others on the machine disturb them little; all codecs see the same chunk
one after another. PCodec appears where the package ``pcodec`` is installed.

    python benchmarks/codec_cost.py --store STORE [--rows 32] [--table FILE.md]
"""

from __future__ import annotations

import os

os.environ["NUMCODECS_BLOSC_USE_CONTEXT"] = "1"

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import LZ4, Blosc, Zlib, blosc
from numpy.typing import NDArray
from zstandard import ZstdCompressor, ZstdDecompressor

Values = NDArray[Any]
REPEATS = 3  # of the faster half of the codecs a single pass is too short to time


@dataclass(frozen=True)
class Codec:
    """Bytes of an array and back; ``fits`` says for which arrays it is tried."""

    name: str
    encode: Callable[[Values], bytes]
    decode: Callable[[bytes, Values], Values]  # the second gives dtype and shape
    core: bool  # in the core of Zarr v3: every reader has it
    fits: Callable[[Values], bool] = lambda _: True


def like(data: Any, value: Values) -> Values:
    """Bytes as an array of the dtype and shape of ``value``."""
    return np.frombuffer(data, value.dtype).reshape(value.shape)


def zstd(level: int) -> Codec:
    """What kdcli writes, at any level."""
    return Codec(
        f"zstd {level}",
        lambda v: ZstdCompressor(level=level).compress(v.data),
        lambda d, v: like(ZstdDecompressor().decompress(d), v),
        core=True,
    )


def transposed(value: Values) -> Values:
    """The last axis first: a channel's cells side by side."""
    return np.ascontiguousarray(np.moveaxis(value, -1, 0))


def zstd_transposed(level: int) -> Codec:
    """Zarr's ``transpose`` before zstd."""

    def decode(data: bytes, value: Values) -> Values:
        return np.moveaxis(like(ZstdDecompressor().decompress(data), np.moveaxis(value, -1, 0)), 0, -1)

    return Codec(
        f"transpose, zstd {level}",
        lambda v: ZstdCompressor(level=level).compress(transposed(v).data),
        decode,
        core=True,
        fits=lambda v: v.ndim > 1,
    )


def zstd_delta(level: int) -> Codec:
    """Differences to the cell or anchor before, then zstd: a ``delta`` filter along the first axis."""

    def encode(value: Values) -> bytes:
        difference = value.copy()
        difference[1:] = value[1:] - value[:-1]
        return ZstdCompressor(level=level).compress(difference.data)

    def decode(data: bytes, value: Values) -> Values:
        return np.add.accumulate(like(ZstdDecompressor().decompress(data), value), axis=0, dtype=value.dtype)

    return Codec(f"delta, zstd {level}", encode, decode, core=False, fits=lambda v: v.ndim > 1 and v.dtype.kind in "iu")


def of_blosc(inner: str, level: int, shuffle: int, name: str) -> Codec:
    """Blosc, whose shuffle takes the items' size."""

    def encode(value: Values) -> bytes:
        data: bytes = Blosc(cname=inner, clevel=level, shuffle=shuffle).encode(value)
        return data

    return Codec(name, encode, lambda d, v: like(Blosc().decode(d), v), core=True)


def of_numcodecs(codec: Any, name: str, *, core: bool) -> Codec:
    """A codec of bytes."""
    return Codec(name, lambda v: bytes(codec.encode(v)), lambda d, v: like(codec.decode(d), v), core=core)


def pcodecs() -> list[Codec]:
    """PCodec where it is installed; it has no 8-bit numbers."""
    if importlib.util.find_spec("pcodec") is None:
        return []
    from numcodecs.pcodec import PCodec

    def codec(level: int) -> Codec:
        made = PCodec(level=level)
        return Codec(
            f"pcodec {level}",
            lambda v: bytes(made.encode(v.reshape(-1))),
            lambda d, v: like(np.asarray(made.decode(d)).tobytes(), v),
            core=False,
            fits=lambda v: v.dtype.itemsize > 1,
        )

    return [codec(level) for level in (1, 8)]


def all_codecs() -> list[Codec]:
    """Every codec that is tried; the first is kdcli's."""
    return [
        *(zstd(level) for level in (1, -1, 3, 6, 12, 19)),
        zstd_transposed(1),
        zstd_transposed(6),
        zstd_delta(1),
        of_blosc("zstd", 1, blosc.SHUFFLE, "blosc shuffle, zstd 1"),
        of_blosc("zstd", 1, blosc.BITSHUFFLE, "blosc bitshuffle, zstd 1"),
        of_blosc("zstd", 5, blosc.BITSHUFFLE, "blosc bitshuffle, zstd 5"),
        of_blosc("lz4", 5, blosc.BITSHUFFLE, "blosc bitshuffle, lz4"),
        of_numcodecs(LZ4(), "lz4", core=False),
        of_numcodecs(Zlib(level=6), "zlib 6", core=False),
        *pcodecs(),
    ]


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """The least CPU seconds of a few calls, and the result."""
    least, result = float("inf"), None
    for _ in range(REPEATS):
        started = time.thread_time()
        result = work(*arguments)
        least = min(least, time.thread_time() - started)
    return least, result


def chunks(store: Path, rows: int) -> dict[str, list[Values]]:
    """Evenly spaced rows of every tensor and entry array."""
    group = zarr.open_group(store, mode="r")
    found: dict[str, list[Values]] = {}
    for path, array in group.members(max_depth=None):
        if isinstance(array, zarr.Array) and path.startswith(("tensors/", "entries/")):
            step = max(1, array.shape[0] // rows)
            found[path] = [np.ascontiguousarray(np.asarray(array[r])) for r in range(0, array.shape[0], step)][:rows]
    return found


def measure(path: str, values: list[Values]) -> list[dict[str, Any]]:
    """Bytes and seconds of each codec over the chunks of an array. Raises AssertionError when one is not lossless."""
    codecs = [c for c in all_codecs() if c.fits(values[0])]
    size = dict.fromkeys((c.name for c in codecs), 0)
    seconds = {c.name: [0.0, 0.0] for c in codecs}
    for value in values:
        for codec in codecs:
            spent, data = timed(codec.encode, value)
            seconds[codec.name][0] += spent
            spent, back = timed(codec.decode, data, value)
            seconds[codec.name][1] += spent
            assert back.tobytes() == value.tobytes(), f"{codec.name} does not give {path} back"
            size[codec.name] += len(data)
    raw = sum(v.nbytes for v in values)
    return [
        {
            "array": path,
            "codec": c.name,
            "core": c.core,
            "raw_bytes_a_row": raw / len(values),
            "bytes_a_row": size[c.name] / len(values),
            "to_first": size[c.name] / size[codecs[0].name],
            "encode_mb_s": raw / 1e6 / max(1e-9, seconds[c.name][0]),
            "decode_mb_s": raw / 1e6 / max(1e-9, seconds[c.name][1]),
            "encode_ms_a_row": 1e3 * seconds[c.name][0] / len(values),
            "decode_ms_a_row": 1e3 * seconds[c.name][1] / len(values),
        }
        for c in codecs
    ]


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    out = [
        "| array | codec | bytes a row | to zstd 1 | compress, ms a row | decompress, ms a row |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    out += [
        f"| `{x['array']}` | {x['codec']} | {x['bytes_a_row']:,.0f} | {x['to_first']:.3f} | {x['encode_ms_a_row']:.2f} | "
        f"{x['decode_ms_a_row']:.2f} |"
        for x in lines
    ]
    return "\n".join(out) + "\n"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--table", type=Path, default=None)
    args = parser.parse_args()
    lines = [line for path, values in chunks(args.store, args.rows).items() for line in measure(path, values)]
    if args.table:
        args.table.write_text(table(lines))
    print(json.dumps({"store": args.store.name, "rows": args.rows, "lines": lines}, indent=1))


if __name__ == "__main__":
    main()
