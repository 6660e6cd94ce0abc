"""Damaged run folders, fed to every command that reads one."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.attack.case import Case, Scratch, Step, run_result, scores
from tests.attack.checkpoints import VALUES
from tests.support.attack.mutate_bytes import damage, replace_by_no_file
from tests.support.attack.mutate_values import damage_json, damage_toml, draw_path, show, with_value
from tests.support.attack.world import HERE, World

FILES = (
    "config.toml",
    "env.json",
    "metrics.json",
    "results.csv",
    "weights/last.pt",
    "weights/best.pt",
    "weights/state.pt",
)
CELLS = ("", "nan", "inf", "-1", "x", "1e999", '"', "1,2", "\x1b[2J", "9" * 400, "A" * 200_000, "\0")


def make(world: World, rng: Random, number: int, scratch: Scratch, damaged: bool) -> Case:
    """A finished or a stopped run that was changed."""
    subject = ("run", "stopped", "stopped_late", "stopped")[number % 4]
    run = Path(shutil.copytree(world.root / subject, scratch.into / "run"))
    what, expect = _damage(world, rng, run) if damaged else ("undamaged", "same")
    return Case(f"{subject}: {what}" if what else "", _steps(world, scratch, run, subject, number // 4, what, expect))


def _steps(world: World, scratch: Scratch, run: Path, subject: str, turn: int, what: str, expect: str) -> list[Step]:
    out = scratch.out
    beside = [str(run), str(world.plain)]
    wrong = what.endswith(" at ap of metrics.json") and what.split()[0] in (
        "nan",
        "text",
        "deep",
        "missing",
        "negative",
    )
    unfinished = wrong or subject != "run"
    compare = Step("compare", ["compare", *beside, "--json"], "left out" if unfinished else "any")
    # a finished run is not read but for its metrics
    wanted = "any" if subject == "run" else expect
    resume = Step(
        f"resume {subject}",
        ["distill", "--resume", str(run)],
        wanted,
        run_result(lambda s: s.into / "run"),
        in_place=True,
    )
    config = ["distill", "--config", str(run / "config.toml"), "--epochs", "1", "--out", str(out / "run")]
    weights = "same" if "last.pt" in what else "any"
    evaluate = ["eval", str(run), "--data", str(world.shapes), "--out", str(out / "scores"), *HERE[:2]]
    slow = [
        Step("compare --html", ["compare", *beside, "--html", str(out / "r.html"), "--plots", str(out / "plots")]),
        Step("--config", config),
        Step("eval of a run", evaluate, weights, scores),
        Step("compare --baseline", ["compare", *beside, "--baseline", str(run), "--fail-if-worse"]),
        Step("distill --seeds", [*world.distill(scratch.into, epochs=2)[:-1], str(_seeded(scratch)), "--seeds", "3"],
            "any", in_place=True),
        Step("--overwrite", [*world.distill(run)[:-1], str(run), "--overwrite"], in_place=True),
    ]  # fmt: skip
    chosen = slow[turn % len(slow)]
    if chosen.name == "eval of a run" and subject != "run":
        chosen = slow[0]
    if chosen.name == "distill --seeds":
        return [compare, Step(chosen.name, chosen.argv, in_place=True)]
    return [compare, chosen] if chosen.name == "--overwrite" else [compare, chosen, resume]


def _seeded(scratch: Scratch) -> Path:
    """The folder of a queue, whose run of seed 3 is a link to the damaged one."""
    folder = scratch.into / "queue"
    folder.mkdir()
    (folder / "seed-3").symlink_to("../run")
    return folder


def _damage(world: World, rng: Random, run: Path) -> tuple[str, str]:
    """Change the run; what was done, and what success of --resume would have to mean."""
    there = [name for name in FILES if (run / name).is_file()]
    name = rng.choice(there)
    path = run / name
    kind = rng.choice(["bytes", "values", "values", "values", "kind", "foreign"])
    expect = "any" if name in ("config.toml", "results.csv", "metrics.json") else "same"
    if kind == "kind":
        return replace_by_no_file(rng, path), expect
    if kind == "foreign":
        return _foreign(world, rng, run, name), expect
    if kind == "bytes":
        return damage(rng, path), expect
    if path.suffix == ".pt":
        return _tensors(rng, path), expect
    if path.suffix == ".csv":
        return _cells(rng, path), expect
    if path.suffix == ".toml":
        text, what, at = damage_toml(rng, tomllib.loads(path.read_text()))
    else:
        text, what, at = damage_json(rng, json.loads(path.read_text()))
        expect = "any" if not {"data_sha256", "store", "teacher_sha256"} & set(at) else expect
    path.write_text(text, errors="surrogatepass")
    return f"{what} at {show(at)} of {name}", expect


def _foreign(world: World, rng: Random, run: Path, name: str) -> str:
    """The file of another run."""
    other = rng.choice([world.run, world.plain, world.stopped, world.stopped_late])
    source = other / name
    if not source.is_file() or source.read_bytes() == (run / name).read_bytes():
        return ""
    shutil.copy(source, run / name)
    return f"{name} of the run {other.name}"


def _cells(rng: Random, path: Path) -> str:
    """Another cell, a line twice, a column less."""
    rows = [line.split(",") for line in path.read_text().splitlines()]
    kind = rng.choice(["cell", "cell", "line", "column", "names"])
    k = rng.randrange(len(rows[0]))
    if kind == "cell":
        rows[rng.randrange(len(rows))][k] = rng.choice(CELLS)
    elif kind == "line":
        rows.append(rows[-1])
    elif kind == "names":
        rows[0][k] = rows[0][0]
    else:
        rows = [row[:k] + row[k + 1 :] for row in rows]
    path.write_text("\n".join(",".join(row) for row in rows) + "\n")
    return f"{kind} {k} of results.csv"


def _tensors(rng: Random, path: Path) -> str:
    """Another value in a file of torch's, written again: no checksum of the archive is wrong."""
    content: Any = torch.load(path, weights_only=True)
    at = draw_path(rng, content)
    value: Any = rng.choice(VALUES)
    old = content
    for key in at:
        old = old[key]
    if isinstance(old, torch.Tensor) and rng.random() < 0.7:
        kind = rng.choice(["short", "value", "nan", "dtype"])
        if kind == "short":
            value = old.reshape(-1)[: max(0, old.numel() - 1)].clone()
        elif kind == "dtype":
            value = old.to(torch.float64) if old.dtype != torch.float64 else old.float()
        else:
            value = old.clone()
            if value.numel():
                value[(0,) * value.ndim] = 7 if kind == "value" else (float("nan") if value.is_floating_point() else 1)
            if torch.equal(value, old):
                return ""
        what = f"{kind} tensor"
    else:
        what = repr(value)[:20]
        if type(old) is type(value) and not isinstance(value, torch.Tensor) and old == value:
            return ""
    torch.save(with_value(content, at, value), path)
    return f"{what} at {show(at)} of {path.name}"
