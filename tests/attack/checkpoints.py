"""Damaged checkpoints, and files that are none, fed to every command that reads one."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.attack.case import CANARY, Case, Scratch, Step, files, run_result, scores
from tests.support.attack.mutate_bytes import damage, replace_by_no_file
from tests.support.attack.mutate_values import draw_path, show, with_value
from tests.support.attack.world import HERE, SMALL, World, reseal

VALUES: tuple[Any, ...] = (
    None, True, "", "x", [], {}, 0, -1, 2.5, float("nan"), float("inf"), 10**30, -(2**63), [1], {"a": 1}, {1: 2},
        b"\0", (), "A" * 100_000,
    "\x1b]0;owned\x07\x1b[2J", "../../../../etc/passwd", torch.zeros(0), torch.zeros(3), [[]] * 1000, 1_000_000, 2**31,
)  # fmt: skip
FREE = ("extra",)  # what the digest of a checkpoint leaves out


class Evil:
    """An object whose unpickling makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.system, (f"touch {self.file}",)


def make(world: World, rng: Random, number: int, scratch: Scratch, damaged: bool) -> Case:
    """A checkpoint that was changed; every tenth time a file of mmdet's."""
    if number % 10 == 9:
        return _foreign_file(world, rng, scratch, damaged)
    file = Path(shutil.copy(world.teacher_pt, scratch.into / "teacher.pt"))
    what, expect = _damage(world, rng, file, scratch) if damaged else ("undamaged", "same")
    return Case(f"checkpoint: {what}" if what else "", _steps(world, scratch, file, number, expect))


def _steps(world: World, scratch: Scratch, file: Path, turn: int, expect: str) -> list[Step]:
    out, data = scratch.out, str(world.shapes)
    evaluate = ["eval", str(file), "--data", data, "--out", str(out / "scores"), *HERE[:2]]
    drawn = ["predict", str(file), str(world.shapes / "val"), "--out", str(out / "drawn")]
    live = [
        "distill",
        "--data",
        data,
        "--teacher",
        str(file),
        "--method",
        "ld",
        "--epochs",
        "1",
        *SMALL,
        "--out",
        str(out / "run"),
    ]
    run = run_result(lambda s: s.out / "run")
    add = ["cache", "add", str(scratch.into / "store"), "--method", "pfi", "--teacher", str(file)]
    slow = [
        Step("predict", drawn, expect, files(lambda s: s.out)),
        Step("cache-teacher", world.cache_teacher(out / "store", teacher=file), expect,
            files(lambda s: s.out / "store")),
        Step("distill --teacher", live, expect, run),
        Step("train --init-from", [*world.train(out / "run"), "--init-from", str(file)], expect, run),
        Step(
            "verify --teacher", ["cache", "verify", str(world.store), "--teacher", str(file), "--rows", "12"],
            "refuse" if expect == "other" else "any",
        ),
        Step("convert", ["convert", str(file), "--from", ("mmdet", "torchvision")[turn % 2], "--classes", "coco",
            "--out", str(out / "c.pt")], "refuse"),
        Step("backbone-weights", [*world.train(out / "run"), "--backbone-weights", str(file)], "refuse"),
        Step("add", add, expect, files(lambda s: s.into / "store"), in_place=True),
    ]  # fmt: skip
    chosen = slow[turn % len(slow)]
    if chosen.name == "add":
        shutil.copytree(world.store_ld, scratch.into / "store")
    return [Step("eval", evaluate, expect, scores), chosen]


def _foreign_file(world: World, rng: Random, scratch: Scratch, damaged: bool) -> Case:
    """A file of mmdet's with damage, for ``convert``."""
    file = scratch.into / "mmdet.pth"
    content = torch.load(world.root / "mmdet.pth", weights_only=True)
    what, expect = "undamaged", "same"
    kind = rng.choice(["bytes", "value", "value", "weights"])
    if damaged and kind == "bytes":
        shutil.copy(world.root / "mmdet.pth", file)
        data = bytearray(file.read_bytes())
        for _ in range(rng.randint(1, 50)):  # mostly weights, which carry no digest
            data[rng.randrange(len(data))] ^= 0xFF
        file.write_bytes(bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])]))
        what, expect = "bytes of a file of mmdet", "any"
    elif damaged:
        at = draw_path(rng, content) if kind == "value" else ("state_dict", rng.choice(list(content["state_dict"])))
        value = rng.choice(VALUES)
        if kind == "weights":
            tensor = content["state_dict"][at[1]]
            value, expect = _other_tensor(rng, tensor)
        else:
            expect = "any"
        content = with_value(content, at, value)
        what = f"{str(value)[:20]!r} at {show(at)} of a file of mmdet"
        torch.save(content, file)
    else:
        torch.save(content, file)
    argv = ["convert", str(file), "--from", "mmdet", "--canvas", "64x96", "--out", str(scratch.out / "c.pt")]
    return Case(what, [Step("convert of mmdet", argv, expect, files(lambda s: s.out))])


def _damage(world: World, rng: Random, file: Path, scratch: Scratch) -> tuple[str, str]:
    """Change the file; what was done, and what success would have to mean."""
    kind = rng.choice(
        ["bytes", "bytes", "bytes", "zip", "value", "value", "sealed", "weights", "weights", "kind", "code", "pickle"]
    )
    if kind == "bytes":
        return damage(rng, file), "same"
    if kind == "kind":
        return replace_by_no_file(rng, file), "refuse"
    if kind == "zip":
        return _rezip(rng, file), "same"
    if kind == "code":
        file.write_bytes(b"")
        evil = Evil(scratch.root / CANARY)
        content = torch.load(world.teacher_pt, weights_only=True)
        torch.save(rng.choice([evil, {**content, "extra": evil}]), file)
        return "an object that runs a command", "refuse"
    if kind == "pickle":
        plain = rng.choice([{}, [], {"format": "kdcli.checkpoint"}, Evil(scratch.root / CANARY)])
        file.write_bytes(pickle.dumps(plain, protocol=rng.choice([0, 2, 4])))
        return "a bare pickle", "refuse"
    content = torch.load(file, weights_only=True)
    if kind == "weights":
        name = rng.choice(list(content["weights"]))
        value, expect = _other_tensor(rng, content["weights"][name])
        content["weights"][name] = value
        sealed = rng.random() < 0.7
        torch.save(_sealed(content) if sealed else content, file)
        return f"{_named(value)} for weight {name}{', resealed' if sealed else ''}", expect if sealed else "refuse"
    at = draw_path(rng, {k: v for k, v in content.items() if k != "weights" or rng.random() < 0.2})
    value = rng.choice(VALUES)
    if _equal(content, at, value):
        return "", "any"
    content = with_value(content, at, copy.deepcopy(value))
    torch.save(_sealed(content) if kind == "sealed" else content, file)
    what = f"{str(value)[:20]!r} at {show(at)}{', resealed' if kind == 'sealed' else ''}"
    return what, "any" if kind == "sealed" or at[0] in FREE else "same"


def _equal(content: Any, at: tuple[Any, ...], value: Any) -> bool:
    for key in at:
        content = content[key]
    return type(content) is type(value) and not isinstance(value, torch.Tensor) and bool(content == value)


def _sealed(content: Any) -> Any:
    """With the digests of its own contents, where it is like enough to a checkpoint to have some."""
    try:
        return reseal(content)
    except (TypeError, AttributeError, KeyError, ValueError, RuntimeError):
        return content


def _named(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)[:20]
    plain = value.layout == torch.strided and value.device.type == "cpu" and value.numel() < 2**20
    finite = not plain or bool(torch.isfinite(value).all())
    return f"{tuple(value.shape)} {value.dtype} {value.layout} {value.device}{'' if finite else ' with nan or inf'}"


def _other_tensor(rng: Random, tensor: torch.Tensor) -> tuple[Any, str]:
    """Another tensor, or none, and what success would have to mean if its digest is right."""
    kind = rng.choice(["nan", "inf", "dtype", "shape", "sparse", "huge view", "value", "scalar", "complex", "meta"])
    if kind in ("nan", "inf") and tensor.is_floating_point() and tensor.numel():
        changed = tensor.clone()
        changed.view(-1)[rng.randrange(changed.numel())] = float(kind)
        return changed, "warned"
    if kind == "dtype":
        return tensor.to(rng.choice([torch.float64, torch.int8, torch.bool, torch.bfloat16])), "any"
    if kind == "shape":
        return torch.zeros(*tensor.shape, 2), "refuse"
    if kind == "sparse":
        return torch.zeros(3, 3).to_sparse(), "refuse"
    if kind == "huge view":
        return torch.zeros(1).expand(2**33), "refuse"
    if kind == "complex":
        return torch.zeros(tensor.shape, dtype=torch.complex64), "any"
    if kind == "meta":
        return torch.empty(tensor.shape, device="meta"), "any"
    return rng.choice([value for value in VALUES if not isinstance(value, torch.Tensor)]), "refuse"


def _rezip(rng: Random, file: Path) -> str:
    """The archive with an entry changed, missing, twice, compressed or more, and right checksums of each."""
    with zipfile.ZipFile(file) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    kind = rng.choice(["changed", "missing", "twice", "compressed", "bomb", "swapped", "renamed"])
    k = rng.randrange(len(entries))
    name, data = entries[k]
    if kind == "changed":
        entries[k] = name, bytes(b ^ (rng.random() < 0.05) for b in data)
    elif kind == "missing":
        del entries[k]
    elif kind == "twice":
        entries.append((name, data[::-1]))
    elif kind == "bomb":
        entries[k] = name, bytes(300 * 2**20)
    elif kind == "swapped":
        other = rng.randrange(len(entries))
        entries[k], entries[other] = (name, entries[other][1]), (entries[other][0], data)
    elif kind == "renamed":
        entries[k] = rng.choice(["../../x", name + "x", "archive/data.pkl"]), data
    method = zipfile.ZIP_DEFLATED if kind in ("compressed", "bomb") else zipfile.ZIP_STORED
    before = file.read_bytes()
    with zipfile.ZipFile(file, "w", method) as archive:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for entry, content in entries:
                archive.writestr(entry, content)
    return "" if file.read_bytes() == before else f"archive entry {name} {kind}"
