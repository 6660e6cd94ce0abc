"""What distillation bought: runs grouped over seeds, with intervals, against a baseline and the teacher.

Runs that are equal in every setting but the seed form a group. AP is that of the last epoch. Intervals are Student t
over seeds; the difference to the baseline is paired by seed where seeds match.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdcli.errors import OptionError
from kdcli.report.baseline import baseline_index, note_unlike_baseline, with_baseline
from kdcli.report.naming import method_names, name_groups
from kdcli.report.runs import Run, load_runs
from kdcli.report.stats import Difference, Summary, difference, summarize
from kdcli.report.teachers import TeacherRow, find_teachers, teacher_runs
from kdcli.report.text import MARK

__all__ = ["Comparison", "Group", "TeacherRow", "Unfinished", "compare", "load_runs"]

_MEANS = ("ap50", "ap75", "ap_s", "ap_m", "ap_l", "ar", "best_ap", "wall_s", "seconds_per_epoch", "images_per_s")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ only in their seed. APs are 0-100, times seconds; plain numbers are means over runs."""

    name: str
    role: str  # baseline, teacher, train or distill
    methods: tuple[str, ...]
    model: str
    epochs: int | None
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    ap: Summary  # of the last epoch, over seeds (a seed that was run twice counts once, with its mean)
    ap50: float | None
    ap75: float | None
    ap_s: float | None
    ap_m: float | None
    ap_l: float | None
    ar: float | None
    best_ap: float | None
    diff: Difference | None  # to the baseline
    wall_s: float | None
    seconds_per_epoch: float | None
    images_per_s: float | None
    peak_memory_bytes: int | None  # the largest of the runs
    store_bytes: int | None
    parameters: int | None
    approximations: tuple[str, ...]
    per_class: dict[str, float | None]

    @property
    def label(self) -> str:
        """The name as tables and plots show it: behind the mark when the group approximates anything.

        The table of results alone shows the bare name, since its row spells the approximations out.
        """
        return f"{MARK} {self.name}" if self.approximations else self.name


@dataclass(frozen=True)
class Unfinished:
    """A run that takes no part, and why."""

    path: str
    problem: str


@dataclass(frozen=True)
class Comparison:
    """Groups (baseline first), teachers, and what differs. ``settings_diff``: key -> group name -> value or None."""

    groups: tuple[Group, ...]
    teachers: tuple[TeacherRow, ...]
    baseline: str | None
    unfinished: tuple[Unfinished, ...]
    settings_diff: dict[str, dict[str, Any]]
    notes: tuple[str, ...]

    @property
    def students(self) -> tuple[Group, ...]:
        """The groups, except a teacher of a single run: it has its row among ``teachers``."""
        return tuple(group for group in self.groups if group.role != "teacher" or len(group.runs) > 1)

    @property
    def footnotes(self) -> tuple[str, ...]:
        """What the mark stands for: a line for each group that approximates; none when none does."""
        return tuple(
            f"{group.label}: {'; '.join(group.approximations)}" for group in self.groups if group.approximations
        )

    def to_json(self) -> dict[str, Any]:
        """Everything as dicts, lists, strings and numbers; runs appear as path, seed and AP."""
        return {
            "baseline": self.baseline,
            "teachers": [{**asdict(teacher), "groups": list(teacher.groups)} for teacher in self.teachers],
            "groups": [_group_json(group) for group in self.groups],
            "unfinished": [asdict(run) for run in self.unfinished],
            "settings_diff": self.settings_diff,
            "notes": list(self.notes),
        }


def compare(runs: Sequence[Run], baseline: Path | None = None) -> Comparison:
    """Group ``runs`` and measure each group against the group of the run folder ``baseline``.

    Without ``baseline`` it is the group of plain training that shares model and epochs with most distilled groups; the
    notes say which, and why. Raises OptionError when runs saw different data, or the baseline is not a finished run.
    """
    runs = with_baseline(runs, baseline)
    finished = [run for run in runs if run.problem is None]
    _same_data(finished)
    members = _grouped(finished)
    notes: list[str] = []
    base = baseline_index(members, baseline, notes)
    if base is not None:
        members.insert(0, members.pop(base))
    taught = {run.path for run, _ in teacher_runs(finished).values()}
    roles = ["teacher" if any(run.path in taught for run in group) else group[0].command for group in members]
    if base is not None:
        roles[0] = "baseline"
    names = name_groups([group[0] for group in members], roles)
    reference = _ap_by_seed(members[0]) if base is not None else None
    groups = tuple(
        _summarize(
            group,
            name=name,
            role=role,
            reference=None if role == "baseline" else reference,
        )
        for group, name, role in zip(members, names, roles, strict=True)
    )
    if base is not None:
        note_unlike_baseline(members, [group.label for group in groups], notes)
    return Comparison(
        groups=groups,
        teachers=find_teachers(finished, {run.path: g.name for g in groups for run in g.runs}),
        baseline=groups[0].name if base is not None else None,
        unfinished=tuple(Unfinished(str(run.path), run.problem) for run in runs if run.problem is not None),
        settings_diff=_settings_diff([group for group in groups if group.role != "teacher"]),
        notes=tuple(notes),
    )


def _same_data(runs: Sequence[Run]) -> None:
    """Refuse runs on different data: by fingerprint where both have one, by path otherwise."""
    for run in runs[1:]:
        first = runs[0]
        ours, theirs = first.env.get("data_sha256"), run.env.get("data_sha256")
        if ours is None or theirs is None:
            ours, theirs = first.config.get("data"), run.config.get("data")
        if ours != theirs:
            raise OptionError(
                f"runs on different data sets cannot be compared: '{first.path}' used {_data_of(first)}, "
                f"'{run.path}' used {_data_of(run)}; compare them apart"
            )


def _data_of(run: Run) -> str:
    sha = run.env.get("data_sha256")
    return f"data '{run.config.get('data')}'" + (f" (sha256 {str(sha)[:12]})" if sha else "")


def _grouped(runs: Sequence[Run]) -> list[list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.settings, sort_keys=True, default=str), []).append(run)
    return [sorted(group, key=lambda run: run.seed) for group in groups.values()]


def _ap_by_seed(group: Sequence[Run]) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for run in group:
        values.setdefault(run.seed, []).append(float(run.metrics["ap"]))
    return {seed: summarize(aps).mean for seed, aps in values.items()}


def _summarize(group: Sequence[Run], *, name: str, role: str, reference: Mapping[int, float] | None) -> Group:
    by_seed = _ap_by_seed(group)
    means = {key: _mean([run.value(key) for run in group]) for key in _MEANS}
    memory = [value for run in group if (value := run.value("peak_memory_bytes")) is not None]
    store, parameters = (_mean([run.value(key) for run in group]) for key in ("store_bytes", "parameters"))
    classes = dict.fromkeys(str(c) for run in group for c in run.metrics.get("per_class", {}))
    return Group(
        name=name,
        role=role,
        methods=method_names(group[0]),
        model=group[0].model,
        epochs=group[0].epochs,
        seeds=tuple(by_seed),
        runs=tuple(group),
        ap=summarize(list(by_seed.values())),
        diff=None if reference is None else difference(by_seed, reference),
        peak_memory_bytes=int(max(memory)) if memory else None,
        store_bytes=None if store is None else round(store),
        parameters=None if parameters is None else round(parameters),
        approximations=tuple(dict.fromkeys(a for run in group for a in run.approximations)),
        per_class={c: _mean([run.metrics.get("per_class", {}).get(c) for run in group]) for c in classes},
        **means,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return summarize(known).mean if known else None


def _settings_diff(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    settings = {group.name: group.runs[0].settings for group in groups}
    keys = sorted({key for values in settings.values() for key in values})
    rows = {key: {name: values.get(key) for name, values in settings.items()} for key in keys}
    return {key: row for key, row in rows.items() if _tells(key, list(row.values()))}


def _tells(key: str, values: Sequence[Any]) -> bool:
    """Whether groups differ in a setting. That a group without a method lacks its options is no difference."""
    if key.startswith("methods.") or key in ("cache", "teacher", "micro_batch", "teacher_precision"):
        values = [value for value in values if value is not None]
    return any(value != values[0] for value in values)


def _group_json(group: Group) -> dict[str, Any]:
    shown = {key: getattr(group, key) for key in Group.__dataclass_fields__ if key != "runs"}
    shown["ap"], shown["diff"] = asdict(group.ap), None if group.diff is None else asdict(group.diff)
    shown["runs"] = [{"path": str(r.path), "seed": r.seed, "ap": r.value("ap")} for r in group.runs]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in shown.items()}
