"""Each command once, from the outside: exit code, stdout and the exact set of files."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kdcli.cli.main import run
from tests.support.small_runs import CANVAS

STUDENT = [
    "--model", "gfl_shufflenet_v2_x0_5", "--canvas", CANVAS, "--epochs", "1", "--batch", "4", "--workers", "0",
    "--threads", "1", "--set", "model.fpn_channels=32", "--set", "model.tower_convs=1",
]  # fmt: skip


def out_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """Run a command that must succeed and print one JSON object."""
    capsys.readouterr()
    code = run([*(str(a) for a in arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def runs(shapes: Path, default_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline and a distilled student, two seeds each, made by the commands themselves."""
    root = tmp_path_factory.mktemp("runs")
    common = ["--data", str(shapes), *STUDENT, "--seeds", "0,1"]
    assert run(["train", *common, "--out", str(root / "baseline")]) == 0
    cache = ["--cache", str(default_store), "--method", "ld,rm,pfi"]
    assert run(["distill", *common, *cache, "--out", str(root / "ld-rm-pfi")]) == 0
    return root


def test_eval_equals_pycocotools_on_its_file(
    capsys: pytest.CaptureFixture[str], shapes: Path, teacher: Path, tmp_path: Path
) -> None:
    found = out_json(capsys, "eval", teacher, "--data", shapes, "--workers", "0", "--out", tmp_path / "scores")
    assert isinstance(found, dict)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(shapes / "annotations" / "val.json"))
        direct = COCOeval(truth, truth.loadRes(str(tmp_path / "scores" / "detections.json")), "bbox")
        direct.evaluate()
        direct.accumulate()
        direct.summarize()
    names = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")
    for name, value in zip((*names, "ar"), (*direct.stats[:6], direct.stats[8]), strict=True):
        assert found[name] == (None if value < 0 else pytest.approx(100 * value, abs=1e-12)), name
    assert found["images"] == 6
    assert found["parameters"] > 10_000
    assert {f.name for f in (tmp_path / "scores").iterdir()} == {"detections.json", "metrics.json"}
    assert run(["eval", str(teacher), "--data", str(shapes), "--workers", "0", "--min-ap", "99"]) == 6


def test_compare(capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path) -> None:
    found = out_json(capsys, "compare", runs, "--html", tmp_path / "r.html", "--plots", tmp_path / "plots")
    assert isinstance(found, dict)
    groups = {g["name"]: g for g in found["groups"]}
    assert len(groups) == 2
    distilled = next(g for g in groups.values() if g["role"] == "distill")
    assert sorted(distilled["seeds"]) == [0, 1]
    assert distilled["diff"] is not None
    mark = "stored as channel_affine_8, float16, log_odds_8, vector_affine_8"
    assert [g["approximations"] for g in groups.values() if g is not distilled] == [[]]
    assert distilled["approximations"] == [mark]
    assert f"≈ {mark}" in (tmp_path / "r.html").read_text()
    assert "http:" not in (tmp_path / "r.html").read_text().replace("http://www.w3.org", "")
    assert {f.name for f in (tmp_path / "plots").iterdir()} <= {"ap.png", "learning_curves.png"}
    capsys.readouterr()
    assert run(["compare", str(runs)]) == 0
    assert "≈ stored as" in capsys.readouterr().err
    assert run(["distill", "--resume", str(runs / "ld-rm-pfi" / "seed-0")]) == 0  # the summary of a finished run
    assert f"  ≈ {mark}\n" in capsys.readouterr().err


def test_predict(capsys: pytest.CaptureFixture[str], runs: Path, shapes: Path, tmp_path: Path) -> None:
    found = out_json(
        capsys, "predict", runs / "baseline" / "seed-0", shapes / "val", "--out", tmp_path / "drawn", "--score", "0.0"
    )
    assert isinstance(found, dict)
    assert len(found["images"]) == 6
    with Image.open(found["images"][0]["drawn"]) as picture:
        assert min(picture.size) >= 96
    results = json.loads((tmp_path / "drawn" / "detections.json").read_text())
    assert {r["image_id"] for r in results} <= {f.name for f in (shapes / "val").iterdir()}


def test_cache_info_verify_show_estimate(
    capsys: pytest.CaptureFixture[str], shapes: Path, teacher: Path, default_store: Path, tmp_path: Path
) -> None:
    info = out_json(capsys, "cache", "info", default_store)
    assert isinstance(info, dict)
    assert info["complete"]
    assert info["rows"] == 48
    assert info["tensors"]["box_distribution@main+vlr"]["encoding"] == "vector_affine_8"
    assert 0 < info["tensors"]["box_distribution@main+vlr"]["error"]["relative"] < 0.01
    on_disk = sum(f.stat().st_size for f in default_store.rglob("c/**/*") if f.is_file())
    assert info["bytes"] == pytest.approx(on_disk, rel=0.01)
    assert run(["cache", "info", str(default_store)]) == 0
    flags = ["--teacher", teacher, "--data", shapes, "--rows", "8"]
    verified = out_json(capsys, "cache", "verify", default_store, *flags)
    assert isinstance(verified, dict)
    assert verified["rows_compared"] == 8
    for key, error in verified["differences"].items():
        assert error["rms"] <= 1.5 * info["tensors"][key]["error"]["rms"] + 1e-6, key
    picture = tmp_path / "row.png"
    assert run(["cache", "show", str(default_store), "3", "--out", str(picture)]) == 0
    with Image.open(picture) as image:
        assert image.width > 3 * image.height  # five panels
    plan = ["cache-teacher", "--data", shapes, "--teacher", teacher, "--method", "ld,rm,pfi", "--workers", "0"]
    priced = out_json(capsys, *plan, "--threads", "1", "--micro-batch", "4", "--out", tmp_path / "store", "--estimate")
    assert isinstance(priced, dict)
    assert not (tmp_path / "store").exists()
    assert priced["rows"] == 48
    assert priced["bytes_total"] == pytest.approx(info["bytes"], rel=0.1)


def test_cache_prune_and_merge(capsys: pytest.CaptureFixture[str], default_store: Path, tmp_path: Path) -> None:
    """A store in parts by view, and the parts joined again."""
    for view, other in (("identity", "hflip"), ("hflip", "identity")):
        part = out_json(capsys, "cache", "prune", default_store, "--view", other, "--out", tmp_path / view)
        assert (part["rows"], part["views"]) == (24, [view])
    whole = out_json(capsys, "cache", "merge", tmp_path / "identity", tmp_path / "hflip", "--out", tmp_path / "both")
    assert (whole["rows"], whole["views"]) == (48, ["identity", "hflip"])
    assert whole["bytes"] == out_json(capsys, "cache", "info", default_store)["bytes"]
    assert run(["cache", "merge", str(tmp_path / "identity"), "--out", str(tmp_path / "one")]) == 2


def test_methods_and_models(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = out_json(capsys, "methods", "--canvas", "320", "--classes", "20")
    assert (found["canvas"], found["classes"], found["boxes"], found["compressed"]) == ("320", 20, 7, False)
    rows = {row["method"]: row for row in found["methods"]}
    works_on = {name: [d for d, on in row["detectors"].items() if not on["missing"]] for name, row in rows.items()}
    dense, every = ["gfl", "retinanet", "atss", "fcos"], ["gfl", "retinanet", "atss", "fcos", "faster_rcnn"]
    assert works_on == {
        **dict.fromkeys(("ld", "rm", "pfi", "bckd"), dense),
        **dict.fromkeys(("defeat", "defeat_thin", "drkd", "drkd_lite", "cwd", "pkd", "fgd"), every),
    }
    assert {d: rows["ld"]["detectors"][d]["set"] for d in dense} == {
        "gfl": "", **dict.fromkeys(("retinanet", "atss", "fcos"), "model.box=distribution")
    }  # fmt: skip
    assert rows["pkd"]["detectors"]["faster_rcnn"]["weights"] == {"weight": 6.0}
    assert rows["ld"]["detectors"]["fcos"]["other_defaults"] == {"vlr_weight": "score", "vlr_metric": "inside"}
    assert rows["ld"]["detectors"]["faster_rcnn"] == {"missing": ["box_distribution", "cls_logits"]}
    for name, row in rows.items():
        assert row["offline"] == {"ld": "exact", "rm": "exact", "defeat_thin": "approximation",
            "drkd_lite": "approximation"}.get(name, "exact, dense")  # fmt: skip
        assert 0 < len(row["evidence"]) < 120
        for detector in works_on[name]:
            on = row["detectors"][detector]
            assert on["bytes"] == sum(on["bytes_by_array"].values()) > 200
            assert {path.split("/values")[0].removeprefix("tensors/") for path in on["bytes_by_array"]} >= {
                *on["needs"]
            }

    def switched(method: str, detector: str) -> dict[str, list[str]]:
        """What each option adds to the needs."""
        on = rows[method]["detectors"][detector]
        assert all(more["bytes"] > on["bytes"] for more in on["options"])
        return {" or ".join(more["set"]): more["adds"] for more in on["options"]}

    imitation = {
        **{f"ld.imitation={name}": [f"features@{name}"] for name in ("fine_grained", "main")},
        "ld.imitation=inside_gt": ["features@inside"],
        "ld.imitation=fitnet": ["features@all"],
        "ld.imitation=defeat": ["features@all", "features@inside"],
        "ld.vlr_kd_weight=1": ["cls_logits@vlr"],
        "ld.imitation=gi": ["features@all", "cls_logits@all", "boxes@all"],
    }
    backbone = {"defeat.backbone_weight=1": ["backbone/c4@all", "backbone/c5@all"]}
    classes = ["proposals/boxes@proposals", "proposals/logits@proposals"]
    for detector in dense:
        assert switched("ld", detector) == imitation
        assert switched("defeat", detector) == backbone  # no proposals there
    assert switched("defeat", "faster_rcnn") == {
        **backbone, "defeat.obj_cls_weight=1 or defeat.bg_cls_weight=1": classes
    }  # fmt: skip
    assert not any(switched(name, "gfl") for name in set(rows) - {"ld", "defeat"})
    monkeypatch.setenv("COLUMNS", "120")
    assert run(["methods", "--canvas", "320"]) == 0
    out, shown = capsys.readouterr()
    assert out == ""
    assert max(map(len, shown.splitlines())) <= 120
    for text in (
        "with model.box=distribution",
        "7 boxes",
        "before compression",
        "imitation_weight=2",
        "ld.imitation=gi",
        *rows,
    ):
        assert text in " ".join(shown.split()), text
    assert run(["methods", "--canvas", "100"]) == 3
    assert run(["methods", "--classes", "0"]) == 2
    names = out_json(capsys, "models")["models"]
    assert {"gfl_resnet18", "retinanet_mobilenet_v3_small"} <= set(names)


def test_retinanet_distils_with_rm_and_pfi(shapes: Path, tmp_path: Path) -> None:
    from tests.support.small_runs import cache_options, make_teacher, write

    teacher = make_teacher(tmp_path / "retina.pt", detector="retinanet", scale=3.0)
    store = write(cache_options(shapes, teacher, method="rm,pfi"), tmp_path / "store")
    flags = [f.replace("gfl_", "retinanet_") for f in STUDENT]
    cache = ["--cache", str(store), "--method", "rm,pfi"]
    assert run(["distill", "--data", str(shapes), *flags, *cache, "--out", str(tmp_path / "run")]) == 0
    header = (tmp_path / "run" / "results.csv").read_text().splitlines()[0]
    assert {"rm_cls", "rm_loc", "pfi_loss", "loss_cls", "loss_bbox"} <= set(header.split(","))


def test_quick_demo_makes_everything_that_it_promises(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    assert run(["demo", "--out", str(out), "--quick"]) == 0
    top = {p.name for p in out.iterdir()}
    assert top == {".kdcli-demo", "shapes", "runs", "store", "plots", "report.html", "detections.png", "row.png"}
    assert {p.name for p in (out / "runs").iterdir()} == {"teacher", "baseline", "bckd", "ld-bckd"}
    with Image.open(out / "detections.png") as picture:
        assert picture.width > 600
