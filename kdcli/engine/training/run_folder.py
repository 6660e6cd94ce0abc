"""The run folder: config.toml, env.json, results.csv, metrics.json, weights/{best,last}.pt, plots/.

``weights/state.pt`` is the resumable state of an unfinished run; it goes away when the run is finished. Every file is
replaced whole, so a killed run never leaves half of one.
"""

from __future__ import annotations

import csv
import io
import json
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
import torch

from kdcli import __version__
from kdcli.errors import MissingPathError, OptionError
from kdcli.files import atomic_write_text, remove_leftovers, require_beside
from kdcli.options import TrainOptions, build, read_toml, to_plain
from kdcli.store.locks import lock_file, lock_folder
from kdcli.untrusted import parse_json

STATE_FILE = Path("weights") / "state.pt"
PACKAGES = ("torch", "torchvision", "zarr", "numpy", "pycocotools", "pillow")

FIRST_EDITION = {"rules": 1}  # of a run's config.toml that names none


def create_run(out: Path, options: TrainOptions, env: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make the run folder; with ``overwrite`` the former one is deleted only now."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(out.with_name(f".{out.name}.lock")):  # two that make it at once would delete each other's files
        require_free(out, overwrite=overwrite)
        dropped = out.with_name(f".{out.name}.dropped")
        if out.exists():
            with lock_run(out):  # not while another process trains in it
                out.rename(dropped)
        shutil.rmtree(dropped, ignore_errors=True)
        staging = out.with_name(f".{out.name}.creating")  # a rename makes the folder appear whole
        shutil.rmtree(staging, ignore_errors=True)
        try:
            (staging / "weights").mkdir(parents=True)
            (staging / "plots").mkdir()
            atomic_write_text(staging / "env.json", json.dumps(env, indent=1) + "\n")
            write_config(staging, options)
            staging.rename(out)
        except OSError:  # a full disk, a limit on the size of files
            shutil.rmtree(staging, ignore_errors=True)
            raise


def lock_run(run: Path) -> AbstractContextManager[bool]:
    """Hold a run folder while it is trained in. Raises OptionError when another process holds it."""
    return lock_folder(
        run, OptionError(f"run '{run}' is being trained by another process; wait for it, or stop it first")
    )


def tidy_finished(run: Path) -> None:
    """Delete what a run that was killed after its last file had no time to: its state, and half-written files."""
    with lock_run(run):
        remove_leftovers(run)
        (run / STATE_FILE).unlink(missing_ok=True)


def require_free(out: Path, *, overwrite: bool) -> None:
    """Raises OptionError when ``out`` exists and ``overwrite`` is not given, is no run folder, or cannot be made."""
    require_beside(out)
    if out.exists():
        if not overwrite:
            raise OptionError(
                f"run folder '{out}' exists; continue it with --resume {out}, choose another --out, or replace it "
                "with --overwrite"
            )
        if not (out / "config.toml").is_file() and any(out.iterdir()):
            raise OptionError(f"'{out}' is not a run folder, so --overwrite will not delete it; choose another --out")


def read_config(run: Path) -> TrainOptions:
    """The options of a run. Raises MissingPathError when there is no run."""
    path = run / "config.toml"
    if not path.is_file():
        raise MissingPathError(f"'{run}' is not a run folder: it has no config.toml")
    return build(TrainOptions, {**FIRST_EDITION, **read_toml(path)})


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a ``--config`` file; of a run's config.toml, with the rules that it began under. Raises as read_toml."""
    fields = read_toml(path)
    of_a_run = path.name == "config.toml" and (path.parent / "env.json").is_file()
    return {**FIRST_EDITION, **fields} if of_a_run else fields


def read_env(run: Path) -> dict[str, Any]:
    """``env.json`` of a run."""
    env: dict[str, Any] = parse_json((run / "env.json").read_bytes())
    return env


def environment(options: TrainOptions, **hashes: Any) -> dict[str, Any]:
    """Versions, hardware, arguments and hashes of what a run read."""
    return {
        "kdcli": __version__,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "argv": sys.argv,
        "seed": options.seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **hashes,
    }


def hardware() -> str:
    """What the run computes on: the GPU's name, or the CPU's and its number of cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = f"{len(names)} x {names[0]}" if names else name
    return name


def write_results(run: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """``results.csv``: one line an epoch; the columns are the union over the epochs."""
    columns = list(dict.fromkeys(column for row in history for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([{k: ("" if v is None else v) for k, v in row.items()} for row in history])
    atomic_write_text(run / "results.csv", text.getvalue())


def write_metrics(run: Path, metrics: Mapping[str, Any]) -> None:
    """``metrics.json``, written last: its existence means that the run is finished."""
    atomic_write_text(run / "metrics.json", json.dumps(metrics, indent=1) + "\n")


def read_metrics(run: Path) -> dict[str, Any] | None:
    """Final metrics, or None for an unfinished run."""
    path = run / "metrics.json"
    if not path.is_file():
        return None
    metrics: dict[str, Any] = parse_json(path.read_bytes())
    return metrics


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables with dotted names."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def write_config(run: Path, options: TrainOptions) -> None:
    """``config.toml``: the options, resolved; it runs again as it is."""
    atomic_write_text(run / "config.toml", tomli_w.dumps(to_plain(options)))


def refuse_changes(run: Path, stored: TrainOptions, asked: TrainOptions) -> None:
    """A resumed run keeps its settings. Raises OptionError naming each one that would change."""
    ours, theirs = _flat(to_plain(asked)), _flat(to_plain(stored))
    changed = [
        f"{k}: {theirs.get(k)} -> {ours.get(k)}" for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k)
    ]
    if changed:
        raise OptionError(
            f"--resume {run} refuses changed settings ({'; '.join(changed)}); leave them out, or start a new run with "
            "--init-from"
        )
