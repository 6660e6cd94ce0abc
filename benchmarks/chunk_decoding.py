"""A stored chunk, checked and decompressed by what kdcli calls and by numcodecs: prints a table.

The chunks are drawn, not a teacher's: codes of 8 bits with the spread of dense features, and box distributions in the first
rows of a padded array. A pass goes over a set of chunks, as a loader does, so that none is still in the first cache. The
figures are in docs/decisions/0020-numcodecs.md.

    OMP_NUM_THREADS=1 python benchmarks/chunk_decoding.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import google_crc32c
import numpy as np
import zstandard
from numcodecs.checksum32 import CRC32C
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

CHUNKS, ROUNDS = 24, 9
WITH_ITSELF = 0x48674BC7  # the crc32c of bytes that end in their own crc32c
# name, rows of the array, real rows, the dims of a row, zstd's level
CASES: list[tuple[str, int, int, tuple[int, ...], int]] = [
    ("LD, 150 of 1,280 x 4 x 17", 1280, 150, (4, 17), 1),
    ("LD, 900 of 7,552 x 4 x 17", 7552, 900, (4, 17), 1),
    ("features, 1,706 x 128", 1706, 1706, (128,), -1),
    ("features, 22,400 x 128", 22400, 22400, (128,), -1),
    ("features, 1,706 x 128, level 1", 1706, 1706, (128,), 1),
    ("features, 22,400 x 128, level 1", 22400, 22400, (128,), 1),
]


def chunk_of(values: NDArray[np.uint8], rows: int, level: int) -> bytes:
    """A chunk as the store has it: a zstd frame, its padding in blocks of its own, then the crc32c of the frame."""
    padding = bytes((rows - len(values)) * values[0].nbytes)
    stream = zstandard.ZstdCompressor(level=level).compressobj(size=values.nbytes + len(padding))
    frame = stream.compress(values.data) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    frame += stream.compress(padding) + stream.flush()
    return frame + int(google_crc32c.value(frame)).to_bytes(4, "little")


def seconds(decode: Callable[[bytes], object], chunks: list[bytes]) -> float:
    """CPU seconds that one of ``chunks`` takes, the mean of one pass over them."""
    started = time.thread_time()
    for chunk in chunks:
        decode(chunk)
    return (time.thread_time() - started) / len(chunks)


def main() -> None:
    """Print one row of the table for each case."""
    rng = np.random.default_rng(0)
    context, zstd, crc32c = zstandard.ZstdDecompressor(), Zstd(), CRC32C()
    print(
        "| array | chunk, bytes | zstandard + google-crc32c, ms | numcodecs, ms | ratio |\n| --- | --- | --- | --- | --- |"
    )
    for name, rows, real, dims, level in CASES:
        values = [rng.normal(128, 28, (real, *dims)).clip(0, 255).astype(np.uint8) for _ in range(CHUNKS)]
        chunks = [chunk_of(value, rows, level) for value in values]

        def direct(chunk: bytes, shape: tuple[int, ...] = (real, *dims)) -> NDArray[np.uint8]:
            assert google_crc32c.value(chunk) == WITH_ITSELF
            out = np.empty(shape, np.uint8)
            context.stream_reader(memoryview(chunk)[:-4]).readinto(out)
            return out

        def through_numcodecs(chunk: bytes) -> NDArray[np.uint8]:
            return np.frombuffer(zstd.decode(crc32c.decode(chunk)), np.uint8)

        assert all((direct(c) == v).all() for c, v in zip(chunks, values, strict=True))
        assert all((through_numcodecs(c)[: v.size] == v.ravel()).all() for c, v in zip(chunks, values, strict=True))
        passes = [(seconds(direct, chunks), seconds(through_numcodecs, chunks)) for _ in range(ROUNDS)]
        ours, theirs = (1000 * statistics.median(times) for times in zip(*passes, strict=True))
        size = statistics.mean(map(len, chunks))
        print(f"| {name} | {size:,.0f} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f} |")
    packages = ("numcodecs", "zstandard", "google-crc32c")
    print("\n" + ", ".join(f"{name} {version(name)}" for name in packages))


if __name__ == "__main__":
    main()
