"""The run folder: config.toml, env.json, results.csv, metrics.json, weights/{best,last}.pt, plots/.

``weights/state.pt`` is the resumable state of an unfinished run; it goes away when the run is finished. Every file is
replaced whole, so a killed run never leaves half of one.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
import torch

from kdcli import __version__
from kdcli.digest import sealed
from kdcli.engine.training import run_files
from kdcli.errors import MissingPathError, OptionError
from kdcli.files import atomic_write_text, remove_leftovers, require_beside
from kdcli.options import TrainOptions, build, read_toml, to_plain
from kdcli.store.locks import lock_file, lock_folder, remove_stale_locks

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


def remove_creation_lock(run: Path) -> None:
    """Delete the lock of ``create_run`` that a process left which was killed when it had made ``run``."""
    if os.access(run.parent, os.W_OK):
        remove_stale_locks(run.parent, f".{glob.escape(run.name)}.lock")


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
    """The options of a run. Raises MissingPathError when there is no run, OptionError when they are damaged."""
    if not (run / "config.toml").exists():
        raise MissingPathError(f"'{run}' is not a run folder: it has no config.toml")
    with _named(run):
        return build(TrainOptions, {**FIRST_EDITION, **run_files.read_settings(run)})


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a ``--config`` file; of a run's config.toml, with the rules that it began under. Raises as read_toml."""
    fields = read_toml(path)
    of_a_run = path.name == "config.toml" and (path.parent / "env.json").is_file()
    return {**FIRST_EDITION, **fields} if of_a_run else fields


def read_env(run: Path) -> dict[str, Any]:
    """``env.json`` of a run. Raises OptionError when it is damaged, or when config.toml is not what it was."""
    with _named(run):
        env = run_files.read_environment(run)
        run_files.require_bound(run_files.read_settings(run), env)
        return env


@contextmanager
def _named(run: Path) -> Iterator[None]:
    """Errors of one of its files with the run and the fix."""
    try:
        yield
    except (OptionError, MissingPathError) as error:
        raise type(error)(f"run '{run}': {error}; restore it from a copy, or start a new run") from error


def environment(options: TrainOptions, **hashes: Any) -> dict[str, Any]:
    """Versions, hardware, arguments, and hashes of what a run read and of its settings; its digest is the run's identity."""
    found = {
        "kdcli": __version__,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "argv": sys.argv,
        "seed": options.seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": run_files.settings_digest(to_plain(options)),
        **hashes,
    }
    return sealed(found)


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
    """Final metrics, or None for an unfinished run. Raises OptionError when they are damaged."""
    if not (run / "metrics.json").exists():
        return None
    with _named(run):
        return run_files.read_metrics(run)


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables with dotted names."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def write_config(run: Path, options: TrainOptions) -> None:
    """``config.toml``: the options, resolved; it runs again as it is."""
    atomic_write_text(run / "config.toml", tomli_w.dumps(to_plain(options)))


def change_config(run: Path, changes: Mapping[str, Any]) -> None:
    """Put ``changes`` into ``config.toml``. What else it says stays as it is, options that it is too old to name too."""
    with _named(run):
        settings = run_files.read_settings(run)
    atomic_write_text(run / "config.toml", tomli_w.dumps({**FIRST_EDITION, **settings, **changes}))


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
