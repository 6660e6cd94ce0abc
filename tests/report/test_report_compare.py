"""Grouping over seeds, pairing, the choice of the baseline, teachers, unfinished runs and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from kdcli.errors import MissingPathError, OptionError
from kdcli.options import ModelOptions, TrainOptions, to_plain
from kdcli.report.compare import compare, load_runs

MakeRun = Callable[..., Path]


def _standard(make_run: MakeRun) -> Path:
    """Baseline and ld over three seeds, pfi over two, a teacher."""
    teacher = make_run("teacher", ap=54.0, model="gfl_resnet50", epochs=8)
    for seed, (base, ld) in enumerate([(40.0, 42.0), (44.0, 46.2), (48.0, 49.8)]):
        make_run(f"base-{seed}", ap=base, seed=seed)
        make_run(f"ld-{seed}", ap=ld, seed=seed, method=["ld"], env={"teacher": str(teacher / "weights/last.pt")})
    for seed in (0, 1):
        make_run(f"pfi-{seed}", ap=41.0, seed=seed, method=["ld", "pfi"], options={"teacher": "runs/teacher"})
    return teacher.parent


def test_runs_that_differ_only_in_seed_form_a_group(make_run: MakeRun) -> None:
    comparison = compare(load_runs([_standard(make_run)]))
    assert [(g.name, g.role, g.seeds) for g in comparison.groups] == [
        ("baseline", "baseline", (0, 1, 2)),
        ("ld", "distill", (0, 1, 2)),
        ("ld+pfi", "distill", (0, 1)),
        ("teacher", "teacher", (0,)),
    ]
    base, ld, pfi, _ = comparison.groups
    assert base.diff is None
    assert base.ap.mean == pytest.approx(44.0)
    assert ld.diff is not None
    assert ld.diff.mean == pytest.approx(2.0)
    assert ld.diff.ci95 == pytest.approx(0.4968, abs=1e-3)
    assert pfi.diff is not None
    assert pfi.diff.how == "paired, 2 seeds"
    assert (base.best_ap, base.wall_s, base.peak_memory_bytes) == (45.0, 80.0, 900_000_002)
    assert (base.store_bytes, ld.store_bytes, ld.parameters, ld.ap75) == (None, 19_000_000, 1_230_000, None)
    assert "2 of 2 distilled groups" in comparison.notes[0]


def test_teacher_row_comes_from_the_run_or_from_the_metrics(make_run: MakeRun) -> None:
    root = _standard(make_run)
    (row,) = compare(load_runs([root])).teachers
    assert (row.name, row.ap, row.parameters, row.groups) == ("gfl_resnet50", 54.0, 1_230_000, ("ld", "ld+pfi"))
    make_run("elsewhere", method=["rm"], env={"teacher": "/gone/best.pt"}, metrics={"teacher_ap": 50.0})
    rows = compare(load_runs([root])).teachers
    assert {(t.name, t.ap, t.groups) for t in rows if t.ap == 50.0} == {("teacher", 50.0, ("rm",))}
    make_run("best", method=["bckd"], options={"teacher": str(root / "teacher/weights/best.pt")})
    assert 55.0 in [t.ap for t in compare(load_runs([root])).teachers]  # best.pt scored best_ap


def test_teacher_of_a_store_is_found_by_the_hash_of_its_weights(make_run: MakeRun) -> None:
    root = make_run("big", ap=54.0, epochs=8, metrics={"weights_sha256": {"last": "aa", "best": "bb"}}).parent
    make_run(
        "a", method=["ld"], options={"cache": "ld.zarr"}, env={"teacher_sha256": "bb"}, metrics={"teacher_ap": 1.0}
    )
    comparison = compare(load_runs([root]))
    (row,) = comparison.teachers
    assert (row.name, row.ap, row.source.endswith("big (best.pt)")) == ("gfl_resnet18", 55.0, True)
    assert [group.role for group in comparison.groups] == ["distill", "teacher"]
    assert comparison.baseline is None  # the teacher trained for more epochs, so it is no baseline


@pytest.mark.parametrize("env", [{}, {"teacher": "big/weights/last.pt"}, {"teacher": "big/weights/best.pt"}])
def test_equal_weights_are_named_by_the_path_or_last(make_run: MakeRun, env: dict[str, str]) -> None:
    root = make_run("big", ap=54.0, epochs=8, metrics={"weights_sha256": {"last": "aa", "best": "aa"}}).parent
    make_run("a", method=["ld"], env={"teacher_sha256": "aa", **env})
    (row,) = compare(load_runs([root])).teachers
    assert row.source.endswith("(best.pt)" if "best" in env.get("teacher", "") else "(last.pt)")


def test_namesakes_are_told_apart_by_what_differs(make_run: MakeRun) -> None:
    make_run("a", method=["ld"], options={"cache": "stores/raw.zarr"})
    make_run("b", method=["ld"], options={"cache": "stores/raw.zarr"}, tables={"ld": {"temperature": 5.0}})
    make_run("c", method=["ld"], options={"cache": "stores/q8.zarr"})
    folder = make_run("base")
    comparison = compare(load_runs([folder.parent]))
    assert [g.name for g in comparison.groups] == [
        "baseline",
        "ld (cache=raw.zarr)",
        "ld (cache=raw.zarr, ld.temperature=5.0)",
        "ld (cache=q8.zarr)",
    ]
    assert comparison.settings_diff["ld.temperature"] == {
        "baseline": None,
        "ld (cache=raw.zarr)": None,
        "ld (cache=raw.zarr, ld.temperature=5.0)": 5.0,
        "ld (cache=q8.zarr)": None,
    }
    assert not {"seed", "out", "canvas", "optim.lr"} & comparison.settings_diff.keys()


def test_configuration_of_the_trainer_is_understood(make_run: MakeRun) -> None:
    root = make_run("plain").parent
    for name, options in {
        "plain": TrainOptions(data="d", model=ModelOptions(name="gfl_resnet18"), threads=2),
        "boxes": TrainOptions(data="d", model=ModelOptions(name="gfl_resnet18", reg_max=8)),
        "a": TrainOptions(command="distill", data="d", method="ld, pfi", model=ModelOptions(name="gfl_resnet18")),
        "b": TrainOptions(
            command="distill",
            data="d",
            seed=1,
            workers=1,
            method="ld,rm",
            model=ModelOptions(name="gfl_resnet34"),
            methods={"ld": {"temperature": 5.0}},
        ),
        "c": TrainOptions(command="distill", data="d", method="ld,rm", model=ModelOptions(name="gfl_resnet18")),
    }.items():
        if name != "plain":
            make_run(name)
        (root / name / "config.toml").write_text(tomli_w.dumps(to_plain(options)))
    comparison = compare(load_runs([root]))
    assert [(group.name, group.methods, group.model) for group in comparison.groups] == [
        ("baseline", (), "gfl_resnet18"),
        ("ld+pfi", ("ld", "pfi"), "gfl_resnet18"),
        ("ld+rm (model=gfl_resnet34, ld.temperature=5.0)", ("ld", "rm"), "gfl_resnet34"),
        ("train (model.reg_max=8)", (), "gfl_resnet18"),
        ("ld+rm (model=gfl_resnet18)", ("ld", "rm"), "gfl_resnet18"),
    ]
    assert not {"threads", "workers"} & comparison.settings_diff.keys()


def test_baseline_shares_model_and_epochs_with_most_groups(make_run: MakeRun) -> None:
    make_run("a", method=["ld"])
    make_run("b", method=["pfi"])
    make_run("c", method=["ld"], model="gfl_resnet34")
    make_run("plain-34", model="gfl_resnet34")
    make_run("plain-long", epochs=8)
    chosen = make_run("plain")
    comparison = compare(load_runs([chosen.parent]))
    assert comparison.groups[0].runs[0].path == chosen
    assert any(
        note.startswith("ld (model=gfl_resnet34) differs from the baseline in model") for note in comparison.notes
    )
    assert "train (model=gfl_resnet34)" in [g.name for g in comparison.groups]


def test_given_baseline_may_lie_elsewhere(make_run: MakeRun) -> None:
    chosen, other = make_run("plain", ap=30.0), make_run("a", method=["ld"])
    comparison = compare(load_runs([other]), baseline=chosen)
    assert comparison.baseline == "baseline"
    assert [g.diff.mean for g in comparison.groups if g.diff] == [10.0]
    with pytest.raises(MissingPathError, match="no run folder"):
        compare(load_runs([other]), baseline=chosen.parent / "nothing")
    with pytest.raises(OptionError, match="unfinished"):
        compare(load_runs([other]), baseline=make_run("half", finished=False))


def test_no_baseline_leaves_differences_out(make_run: MakeRun) -> None:
    comparison = compare(load_runs([make_run("a", method=["ld"])]))
    assert comparison.baseline is None
    assert comparison.groups[0].diff is None
    assert "--baseline" in comparison.notes[0]


def test_unfinished_and_broken_runs_do_not_fail_the_others(make_run: MakeRun) -> None:
    root = make_run("good").parent
    make_run("half", finished=False, seed=1)
    (make_run("torn", seed=2) / "metrics.json").write_text('{"ap": 4')
    (make_run("bad-toml", seed=3) / "config.toml").write_text("epochs = = 3")
    make_run("no-truth", seed=4, ap=None)
    (make_run("bad-csv", seed=5) / "results.csv").write_text("epoch,AP\n1,forty\n")
    comparison = compare(load_runs([root]))
    assert [run.path.name for group in comparison.groups for run in group.runs] == ["good"]
    problems = {Path(run.path).name: run.problem for run in comparison.unfinished}
    assert problems["half"] == "unfinished: no metrics.json after 2 of 4 epochs"
    assert "metrics.json cannot be read" in problems["torn"]
    assert "config.toml cannot be read" in problems["bad-toml"]
    assert "no AP" in problems["no-truth"]
    assert "results.csv cannot be read" in problems["bad-csv"]


def test_different_data_is_refused(make_run: MakeRun) -> None:
    root = make_run("a").parent
    other = make_run("b", env={"data_sha256": "fedcba9876543210"})
    with pytest.raises(OptionError, match=r"runs/a' used .*0123456789ab.*runs/b' used .*fedcba987654"):
        compare(load_runs([root]))
    (other / "env.json").write_text("{}")  # without a fingerprint the path decides
    assert len(compare(load_runs([root])).groups) == 1
    other.joinpath("config.toml").write_text('command = "train"\ndata = "coco"\n')
    with pytest.raises(OptionError, match="data 'coco'"):
        compare(load_runs([root]))


def test_a_moved_data_set_is_the_same_data(make_run: MakeRun) -> None:
    root = make_run("a").parent
    make_run("b", seed=1, options={"data": "/mnt/shapes"})
    (group,) = compare(load_runs([root])).groups
    assert group.seeds == (0, 1)


def test_a_seed_run_twice_counts_once(make_run: MakeRun) -> None:
    root = make_run("a", ap=40.0).parent
    make_run("again", ap=42.0)
    make_run("b", ap=43.0, seed=1)
    (group,) = compare(load_runs([root])).groups
    assert (group.ap.n, group.ap.mean, group.seeds, len(group.runs)) == (2, 42.0, (0, 1), 3)


def test_load_runs_finds_each_run_once(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("deep/er/a")
    (folder / "weights" / "config.toml").parent.mkdir()
    (folder / "weights" / "config.toml").write_text("")  # inside a run: not another run
    store = tmp_path / "runs" / "x.zarr"
    store.mkdir()
    (store / "zarr.json").write_text("{}")
    (store / "sub").mkdir()
    (store / "sub" / "config.toml").write_text("")
    runs = load_runs([tmp_path / "runs", folder])
    assert [run.path for run in runs] == [folder]
    with pytest.raises(MissingPathError, match="no run below"):
        load_runs([store])
    with pytest.raises(MissingPathError, match="no run folder"):
        load_runs([tmp_path / "nothing"])


def test_resumed_history_keeps_the_last_row_of_an_epoch(make_run: MakeRun) -> None:
    folder = make_run("a")
    (folder / "results.csv").write_text("epoch,AP\n1,10\n2,20\n2,21\n3,\n")
    (run,) = load_runs([folder])
    assert run.curve("AP") == [(1, 10.0), (2, 21.0)]


def test_json_holds_every_number_and_no_object(make_run: MakeRun) -> None:
    root = _standard(make_run)
    make_run("approx", method=["pfi"], metrics={"approximations": ["pfi-8-channels"]})
    make_run("half", finished=False, seed=9)
    report = compare(load_runs([root])).to_json()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    ld = next(group for group in report["groups"] if group["name"] == "ld")
    assert ld["ap"]["n"] == 3
    assert ld["diff"]["how"] == "paired, 3 seeds"
    assert ld["seeds"] == [0, 1, 2]
    assert [run["seed"] for run in ld["runs"]] == [0, 1, 2]
    assert [g["approximations"] for g in report["groups"] if g["name"] == "pfi"] == [["pfi-8-channels"]]
    assert len(report["unfinished"]) == 1
    assert report["baseline"] == "baseline"
