"""Damaged pictures, and things that are none, fed to every command that reads one."""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

from PIL import Image

from tests.attack.case import Case, Scratch, Step, files, run_result
from tests.support.attack.mutate_bytes import damage, replace_by_no_file
from tests.support.attack.world import HERE, World


def make(world: World, rng: Random, number: int, scratch: Scratch, damaged: bool) -> Case:
    """A data set with one picture changed, of the training split twice out of three times."""
    data = Path(shutil.copytree(world.shapes, scratch.into / "data"))
    split = "val" if number % 3 == 2 else "train"
    path = data / split / f"{rng.randrange(2 if split == 'val' else 6):05d}.jpg"
    before = path.read_bytes()
    what, expect = _damage(rng, path) if damaged else ("undamaged", "any")
    changed = not path.is_file() or path.read_bytes() != before
    return Case(
        f"{split}: {what}" if what and (changed or expect == "refuse" or not damaged) else "",
        _steps(world, scratch, data, split, number // 3, expect),
    )


def _steps(world: World, scratch: Scratch, data: Path, split: str, turn: int, expect: str) -> list[Step]:
    """``expect`` is of commands that take any picture; those that are bound to what the teacher, or the run, saw refuse
    another one."""
    train = split == "train"
    bound = "refuse" if train else expect
    out = scratch.out
    check = Step("data check", ["data", "check", str(data)], expect)
    drawn = ["predict", str(world.teacher_pt), str(data / split), "--out", str(out / "drawn")]
    evaluate = [
        "eval",
        str(world.teacher_pt),
        "--data",
        str(data),
        "--split",
        split,
        *HERE[:2],
        "--out",
        str(out / "scores"),
    ]
    steps = [check, Step("eval", evaluate, expect)]
    slow: list[Step] = [
        Step("predict", drawn, "any"),
        Step("distill", world.distill(out / "run", data=data), bound),
        Step("train", world.train(out / "run", data=data), expect),
        Step("cache-teacher", world.cache_teacher(out / "store", data=data), expect if train else "any"),
    ]
    if train:
        stopped = ["distill", "--resume", str(scratch.into / "run"), "--data", str(data)]
        add = ["cache", "add", str(scratch.into / "store"), "--data", str(data), "--method", "pfi"]
        again = [
            "cache",
            "verify",
            str(world.store),
            "--teacher",
            str(world.teacher_pt),
            "--data",
            str(data),
            "--rows",
            "12",
        ]
        slow += [
            Step("resume", stopped, "refuse", run_result(lambda s: s.into / "run"), in_place=True),
            Step("add", add, "refuse", files(lambda s: s.into / "store"), in_place=True),
            Step("verify --teacher", again, "refuse"),
        ]
    chosen = slow[turn % len(slow)]
    if chosen.name == "resume":
        shutil.copytree(world.stopped, scratch.into / "run")
    if chosen.name == "add":
        shutil.copytree(world.store_ld, scratch.into / "store")
    return [*steps, chosen]


def _png(width: int, height: int, chunks: list[tuple[bytes, bytes]], pixels: bytes = b"") -> bytes:
    """A PNG of any header and chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    whole = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in whole)
    return b"\x89PNG\r\n\x1a\n" + body


def _saved(
    path: Path, kind: str, change: Callable[[Image.Image], Image.Image] = lambda x: x, **options: object
) -> None:
    """Save the picture of ``path`` in another format under the same name."""
    with Image.open(path) as image:
        image.load()
    data = io.BytesIO()
    change(image).save(data, kind, **options)
    path.write_bytes(data.getvalue())


def _damage(rng: Random, path: Path) -> tuple[str, str]:
    """Change the picture; what was done, and what success of a command would have to mean."""
    kind = rng.choice(["bytes", "bytes", "kind", "format", "size", "mode", "bomb", "text", "exif", "empty"])
    if kind == "bytes":
        return damage(rng, path), "any"  # a JPEG has no checksum: a flipped bit makes another picture
    if kind == "kind":
        return replace_by_no_file(rng, path), "refuse"
    if kind == "format":
        name = rng.choice(["PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000"])
        _saved(path, name)
        return f"{name} under its name", "any"
    if kind == "size":
        side = rng.choice([1, 2, 64, 3000])
        _saved(path, "PNG", lambda image: image.resize((side, side)))
        return f"{side}x{side} instead", "refuse"
    if kind == "mode":
        mode = rng.choice(["1", "L", "P", "CMYK", "I;16", "I", "F", "LA", "RGBA", "YCbCr", "LAB"])
        format_ = "TIFF" if mode in ("I;16", "I", "F", "LAB", "CMYK", "YCbCr") else "PNG"
        _saved(
            path,
            format_,
            lambda image: image.convert("L").convert(mode) if mode in ("I;16", "I", "F") else image.convert(mode),
        )
        return f"mode {mode}", "any"
    if kind == "bomb":
        side = rng.choice([20_000, 60_000, 2**31 - 1])
        path.write_bytes(_png(side, side, [], bytes(1000)))
        return f"a header of {side}x{side}", "refuse"
    if kind == "text":
        return _text(rng, path), "any"
    if kind == "exif":
        return _exif(rng, path), "any"
    path.write_bytes(rng.choice([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBP"]))
    return "a signature alone", "refuse"


def _text(rng: Random, path: Path) -> str:
    """A PNG of the same pixels with text chunks that nobody should unpack."""
    with Image.open(path) as image:
        size, pixels = image.size, image.convert("RGB").tobytes()
    lines = b"".join(b"\0" + pixels[k * 3 * size[0] : (k + 1) * 3 * size[0]] for k in range(size[1]))
    big = zlib.compress(bytes(100 * 2**20))
    kind = rng.choice(["zTXt", "iTXt", "tEXt", "iCCP", "many"])
    chunks = {
        "zTXt": [(b"zTXt", b"k\0\0" + big)],
        "iTXt": [(b"iTXt", b"k\0\1\0\0\0" + big)],
        "tEXt": [(b"tEXt", b"k\0" + b"\x1b]0;owned\x07" * 200_000)],
        "iCCP": [(b"iCCP", b"k\0\0" + big)],
        "many": [(b"zTXt", b"k\0\0" + zlib.compress(bytes(900_000)))] * 100,
    }[kind]
    path.write_bytes(_png(*size, chunks, lines))
    return f"PNG with {kind} chunks"


def _exif(rng: Random, path: Path) -> str:
    """An orientation that turns, cannot be, or is no number, or tags that are garbage."""
    exif = Image.Exif()
    kind = rng.choice(["turned", "range", "text", "garbage", "many"])
    if kind in ("turned", "range"):
        exif[274] = rng.choice([3, 6, 8, 2, 5] if kind == "turned" else [0, 9, 999, 65535])
    data = exif.tobytes()
    if kind == "text":
        data = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04six\0\0\0\0\0"
    elif kind == "garbage":
        data = b"Exif\0\0" + rng.choice(
            [b"MM\0*\xff\xff\xff\xff", b"", b"XX", rng.randbytes(60), b"II*\0\x08\0\0\0\xff\xff" + rng.randbytes(40)]
        )
    elif kind == "many":
        data = (
            b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 4000) + struct.pack("<HHII", 274, 3, 1, 6) * 4000 + bytes(4)
        )
    _saved(path, "JPEG", exif=data)
    return f"EXIF {kind}"
