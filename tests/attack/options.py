"""Absurd values of every flag of every command."""

from __future__ import annotations

import shutil
from random import Random

from tests.attack.case import Case, Scratch, Step
from tests.support.attack.world import World

# of any flag; what no flag may take is told below by the kind of flag
TEXTS = ["", " ", "x", "-", "--", ",", "a,b", "\x1b]0;owned\x07\x1b[2J", "A" * 100_000, "../../../../etc/passwd",
    "/dev/zero", "/dev/null", ".",
         "/", "\n", "\u202ecod.exe", "{}", "[bold]x[/bold]", "%s%n", "$(touch x)", "é" * 300]  # fmt: skip
NUMBERS = ["0", "-1", "1", "3", "1e3", "nan", "inf", "-inf", "1e999", str(10**12), str(2**31), str(2**63),
    str(10**30), "9" * 5000, "0x10", "1_0",
           "٣", "1.5", "+1", ""]  # fmt: skip
NEVER = {
    "nan",
    "inf",
    "-inf",
    "1e999",
    "-1",
    str(10**30),
    "9" * 5000,
    "",
    str(10**12),
    str(2**63),
    str(2**31),
}  # no flag of a count takes these
SIZES = [
    "0",
    "-32",
    "31",
    "32x",
    "x32",
    "32x32x32",
    "1000000",
    "1000000x1000000",
    "1e9",
    "9" * 5000,
    "64 x 96",
    "٣٢",
    str(2**31),
    "nan",
]
VIEWS = ["crop-1000000000", "crop-0", "crop--1", "scale-1000000000", "identity,identity", ",", "hflip", "crop-x",
    "identity," * 5000, "CROP-1",
         "crop-" + "9" * 5000, f"crop-{2**63}"]  # fmt: skip
SETS = ["optim.lr=nan", "optim.lr=1e999", "optim.steps=[1,-1]", "model.fpn_channels=0",
    "model.fpn_channels=1000000000", "model.tower_convs=10**9",
        "model.tower_convs=100000", "model.reg_max=1000000000", "train.save_steps=0", "train.micro_batch=-1", "x",
        "=", ".=", "optim.=1",
        "optim.lr", "optim.lr=[[[[1]]]]", "optim.lr=" + "[" * 20_000, "train.workers=1000",
        "train.threads=1000000000000", "train.seed=1e9",
        "model.name=\x1b[2J", "optim.warmup_steps=1000000000000000000000", "train.canvas=\"1000000\"", "model.bn=x",
        "ld.temperature=nan",
        "ld.temperature=0", "ld.weight=-1", "ld.weight=1e308", "pfi.weight=nan", "train.rules=99",
        "model.head_channels=-4", "optim.ema_decay=1.0",
        "optim.clip=nan", "train.teacher_precision=fp8", "train.data=/dev/zero",
        "train.views=\"crop-1000000000\""]  # fmt: skip

KINDS: dict[str, list[str]] = {
    "text": TEXTS,
    "path": TEXTS,
    "count": NUMBERS,
    "number": NUMBERS,
    "size": SIZES,
    "views": VIEWS,
    "set": SETS,
}
RUN = {
    "--canvas": "size", "--epochs": "count", "--seed": "count", "--batch": "count", "--views": "views",
    "--workers": "count", "--threads": "count",
    "--eval-every": "count", "--set": "set", "--device": "text", "--amp": "text", "--model": "text",
    "--backbone-weights": "path",
    "--init-from": "path", "--config": "path", "--seeds": "count", "--data": "path", "--resume": "path",
    "--out": "path",
}  # fmt: skip
STORE = {"STORE": "path"}
FLAGS: dict[str, dict[str, str]] = {
    "train": RUN,
    "distill": {**RUN, "--cache": "path", "--teacher": "path", "--method": "text", "--shuffle": "text",
    "--gradient-limit": "number"},
    "cache-teacher": {
        "--data": "path", "--teacher": "path", "--method": "text", "--split": "text", "--canvas": "size",
        "--views": "views", "--encoding": "text",
        "--precision": "text", "--micro-batch": "count", "--shard-rows": "count", "--min-teacher-ap": "number",
        "--device": "text",
        "--threads": "count", "--workers": "count", "--config": "path", "--set": "set", "--shard": "count",
        "--out": "path",
    },
    "eval": {"--data": "path", "--split": "text", "--canvas": "size", "--batch": "count", "--device": "text",
    "--amp": "text", "--workers": "count",
             "--out": "path", "--min-ap": "number", "CHECKPOINT": "path"},
    "predict": {"--score": "number", "--canvas": "size", "--device": "text", "--out": "path", "CHECKPOINT": "path",
    "SOURCE": "path"},
    "compare": {"--baseline": "path", "--html": "path", "--plots": "path", "RUNS": "path"},
    "cache verify": {**STORE, "--teacher": "path", "--data": "path", "--rows": "count", "--device": "text"},
    "cache info": STORE,
    "cache bench": {**STORE, "--method": "text", "--workers": "count", "--batch": "count", "--rows": "count",
    "--step-ms": "number"},
    "cache show": {**STORE, "IMAGE": "count", "--view": "text", "--data": "path", "--out": "path"},
    "cache add": {**STORE, "--method": "text", "--teacher": "path", "--data": "path", "--encoding": "text",
    "--device": "text", "--set": "set"},
    "cache prune": {**STORE, "--tensor": "text", "--view": "text", "--out": "path"},
    "cache merge": {**STORE, "--data": "path", "--out": "path"},
    "convert": {"FILE": "path", "--from": "text", "--model": "text", "--classes": "text", "--data": "path",
    "--canvas": "size", "--style": "text",
                "--prefix": "text", "--set": "set", "--out": "path"},
    "data check": {"ROOT": "path"},
    "data make-shapes": {"--train": "count", "--val": "count", "--seed": "count", "OUT": "path"},
    "methods": {"--canvas": "size", "--classes": "count"},
}  # fmt: skip
PAIRS = [(command, flag) for command, flags in FLAGS.items() for flag in flags]
BIG = {
    ("methods", "--classes"),
    ("data make-shapes", "--train"),
    ("data make-shapes", "--val"),
    ("cache bench", "--rows"),
}  # large ones are allowed


def make(world: World, rng: Random, number: int, scratch: Scratch, damaged: bool) -> Case:
    """One flag of one command with an absurd value."""
    command, flag = PAIRS[number % len(PAIRS)]
    kind = FLAGS[command][flag]
    value = rng.choice(KINDS[kind])
    if rng.random() < 0.1:
        value = rng.choice(TEXTS)
    if "\0" in value or _would_harm(command, flag, value):
        return Case("", [])
    argv = _with(_line(world, scratch, command), flag, value)
    odd = (flag == "--seeds" or flag == "--seed") and value not in ("nan", "inf", "-inf", "1e999", "")
    refuse = (
        kind in ("count", "number")
        and value in NEVER
        and not odd
        and (command, flag) not in BIG
        and not _legitimate(flag, value)
    )
    shown = value if len(value) < 60 else f"{value[:30]}... ({len(value)} characters)"
    in_place = command in ("cache add", "cache prune")
    return Case(f"{command} {flag} {shown!r}", [Step(command, argv, "refuse" if refuse else "any", in_place=in_place)])


def _would_harm(command: str, flag: str, value: str) -> bool:
    """An output that would be written where the machine keeps its own files, or work that fills the machine."""
    out = flag in ("--out", "OUT", "--html", "--plots")
    return (out and value in ("/", "../../../../etc/passwd", "/dev/zero", "/dev/null", ".")) or (
        (command, flag) in BIG and value.strip("+").isdigit() and len(value) > 3
    )


def _legitimate(flag: str, value: str) -> bool:
    """Counts that may be as large as anybody likes: no work grows with them here."""
    large = value.isdigit() and len(value) < 25
    return large and flag in (
        "--eval-every",
        "--rows",
        "--shard-rows",
        "--step-ms",
        "--gradient-limit",
        "--batch",
        "--micro-batch",
    )


def _with(line: list[str], flag: str, value: str) -> list[str]:
    """The command line with a flag's or an argument's value; ``=`` so that a value may begin with a dash."""
    if not flag.startswith("--"):
        return [
            value if word == f"<{flag}>" else word.partition("|")[2] if word.startswith("<") else word
            for word in _marked(line, flag)
        ]
    plain = [word.partition("|")[2] if word.startswith("<") else word for word in line]
    if flag in plain and flag != "--set":
        at = plain.index(flag)
        plain = plain[:at] + plain[at + 2 :]
    if flag == "--seeds" and "--seed" in plain:
        plain = [w for w in plain if w != "--seed"]
    return [*plain, f"{flag}={value}"]


def _marked(line: list[str], flag: str) -> list[str]:
    return [f"<{flag}>" if word.startswith(f"<{flag}>|") else word for word in line]


def _line(world: World, scratch: Scratch, command: str) -> list[str]:
    """A command line that succeeds; arguments are marked ``<NAME>|value``."""
    out, shapes, teacher = scratch.out, str(world.shapes), str(world.teacher_pt)
    store = f"<STORE>|{world.store}"
    if command in ("cache add", "cache prune"):
        source = world.store_ld if command == "cache add" else world.store
        store = f"<STORE>|{shutil.copytree(source, scratch.into / 'store')}"
    lines: dict[str, list[str]] = {
        "train": world.train(out / "run"),
        "distill": world.distill(out / "run"),
        "cache-teacher": world.cache_teacher(out / "store"),
        "eval": ["eval", f"<CHECKPOINT>|{teacher}", "--data", shapes, "--workers", "0"],
        "predict": [
            "predict",
            f"<CHECKPOINT>|{teacher}",
            f"<SOURCE>|{world.shapes / 'val'}",
            "--out",
            str(out / "drawn"),
        ],
        "compare": ["compare", f"<RUNS>|{world.run}", str(world.plain)],
        "cache verify": ["cache", "verify", store, "--teacher", teacher],
        "cache info": ["cache", "info", store],
        "cache bench": ["cache", "bench", store, "--workers", "0", "--rows", "12", "--batch", "4"],
        "cache show": ["cache", "show", store, "<IMAGE>|1", "--out", str(out / "row.png")],
        "cache add": ["cache", "add", store, "--method", "pfi"],
        "cache prune": ["cache", "prune", store, "--tensor", "features@all"],
        "cache merge": [
            "cache",
            "merge",
            f"<STORE>|{world.store_identity}",
            str(world.store_hflip),
            "--out",
            str(out / "store"),
        ],
        "convert": ["convert", f"<FILE>|{world.root / 'mmdet.pth'}", "--from", "mmdet", "--out", str(out / "c.pt")],
        "data check": ["data", "check", f"<ROOT>|{world.shapes}"],
        "data make-shapes": ["data", "make-shapes", f"<OUT>|{out / 'shapes'}", "--train", "1", "--val", "1"],
        "methods": ["methods"],
    }
    return lines[command]
