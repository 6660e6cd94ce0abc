"""Wrong input: one line that says what, where and the fix; the documented exit code; nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from kdcli.cli.main import run
from kdcli.store.storage import local as places
from tests.support.command_line import SMALL, STUDENT, refused
from tests.support.small_runs import CANVAS, CLASSES, cache_options, make_teacher, write


@pytest.fixture
def copy(shapes: Path, tmp_path: Path) -> Path:
    """A data set to damage."""
    target = tmp_path / "data"
    shutil.copytree(shapes, target)
    return target


def test_missing_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = refused(capsys, 3, "train", "--data", tmp_path / "nowhere", *STUDENT, "--out", tmp_path / "run")
    assert str(tmp_path / "nowhere") in line
    assert not (tmp_path / "run").exists()


def test_missing_flag_values(capsys: pytest.CaptureFixture[str], shapes: Path, tmp_path: Path) -> None:
    assert "--out" in refused(capsys, 2, "train", "--data", shapes, *STUDENT)
    assert "--data" in refused(capsys, 2, "train", *STUDENT, "--out", tmp_path / "run")
    assert "--model" in refused(capsys, 2, "train", "--data", shapes, *SMALL, "--out", tmp_path / "run")


def test_what_verify_would_not_use_is_refused(
    capsys: pytest.CaptureFixture[str], shapes: Path, default_store: Path
) -> None:
    for flags in (["--data", shapes], ["--device", "cpu"]):
        assert "add --teacher RUN" in refused(capsys, 2, "cache", "verify", default_store, *flags)


def test_no_number_of_workers_is_refused(capsys: pytest.CaptureFixture[str], default_store: Path) -> None:
    assert "--workers ''" in refused(capsys, 2, "cache", "bench", default_store, "--workers", "")


def test_truncated_image(capsys: pytest.CaptureFixture[str], copy: Path, tmp_path: Path) -> None:
    image = sorted((copy / "train").iterdir())[0]
    image.write_bytes(image.read_bytes()[:500])
    line = refused(capsys, 3, "train", "--data", copy, *STUDENT, "--out", tmp_path / "run")
    assert image.name in line
    assert not (tmp_path / "run").exists()
    assert run(["train", "--data", str(copy), *STUDENT, "--skip-bad", "--out", str(tmp_path / "run")]) == 0
    assert image.name in capsys.readouterr().err.replace("\n", "")


def test_data_check_lists_faults(capsys: pytest.CaptureFixture[str], copy: Path) -> None:
    assert run(["data", "check", str(copy)]) == 0
    image = sorted((copy / "train").iterdir())[1]
    image.write_bytes(image.read_bytes()[:800])
    capsys.readouterr()
    assert run(["data", "check", str(copy), "--json"]) == 3
    out, err = capsys.readouterr()
    assert image.name in err
    found = json.loads(out)["train"]["faults"]
    assert [f["kind"] for f in found] == ["corrupt image"]


def test_skip_bad_trains_and_lists(capsys: pytest.CaptureFixture[str], copy: Path, tmp_path: Path) -> None:
    image = sorted((copy / "train").iterdir())[0]
    image.unlink()
    assert run(["train", "--data", str(copy), *STUDENT, "--skip-bad", "--out", str(tmp_path / "run")]) == 0
    assert f"left out: image 1 ({image.name})" in capsys.readouterr().err.replace("\n", " ")


def test_json_without_images(capsys: pytest.CaptureFixture[str], copy: Path, tmp_path: Path) -> None:
    file = copy / "annotations" / "train.json"
    content = json.loads(file.read_text())
    del content["images"]
    file.write_text(json.dumps(content))
    assert "images" in refused(capsys, 3, "train", "--data", copy, *STUDENT, "--out", tmp_path / "run")


def test_store_of_another_data_set(
    capsys: pytest.CaptureFixture[str], copy: Path, default_store: Path, tmp_path: Path
) -> None:
    file = copy / "annotations" / "train.json"
    content = json.loads(file.read_text())
    content["annotations"] = content["annotations"][1:]
    file.write_text(json.dumps(content))
    line = refused(
        capsys,
        4,
        "distill",
        "--data",
        copy,
        "--cache",
        default_store,
        "--method",
        "ld",
        *STUDENT,
        "--out",
        tmp_path / "r",
    )
    assert "annotations_sha256" in line
    assert not (tmp_path / "r").exists()


def test_store_of_another_canvas(
    capsys: pytest.CaptureFixture[str], shapes: Path, default_store: Path, tmp_path: Path
) -> None:
    flags = [f if f != CANVAS else "160" for f in STUDENT]
    line = refused(
        capsys,
        4,
        "distill",
        "--data",
        shapes,
        "--cache",
        default_store,
        "--method",
        "ld",
        *flags,
        "--out",
        tmp_path / "r",
    )
    assert "canvas: store 96x128, here 160" in line


def test_store_with_a_changed_image(
    capsys: pytest.CaptureFixture[str], copy: Path, teacher: Path, tmp_path: Path
) -> None:
    store = write(cache_options(copy, teacher, method="rm"), tmp_path / "store")
    images = sorted((copy / "train").iterdir())
    for image in images:
        image.write_bytes(image.read_bytes() + b"\0")  # still the same picture, but not the same file
    line = refused(
        capsys, 4, "distill", "--data", copy, "--cache", store, "--method", "rm", *STUDENT, "--out", tmp_path / "r"
    )
    assert "the image file is not the one that the teacher saw" in line


def test_store_of_another_teacher(
    capsys: pytest.CaptureFixture[str], shapes: Path, default_store: Path, tmp_path: Path
) -> None:
    other = make_teacher(tmp_path / "other.pt", seed=12)
    flags = ["--data", shapes, "--teacher", other, "--method", "ld,rm,pfi", "--workers", "0", "--threads", "1"]
    more = ["--shard-rows", "10", "--micro-batch", "4"]
    before = {f: f.stat().st_mtime_ns for f in default_store.rglob("*")}
    line = refused(capsys, 4, "cache-teacher", *flags, *more, "--out", default_store)
    assert "weights_sha256" in line
    verify = refused(capsys, 4, "cache", "verify", default_store, "--teacher", other, "--data", shapes)
    assert "another teacher" in verify
    assert {f: f.stat().st_mtime_ns for f in default_store.rglob("*")} == before


def test_flipped_byte(capsys: pytest.CaptureFixture[str], shapes: Path, default_store: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(default_store, store)
    file = store / "tensors" / "features@all" / "values" / "c" / "0" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert str(file) in refused(capsys, 4, "cache", "verify", store)
    line = refused(
        capsys, 4, "distill", "--data", shapes, "--cache", store, "--method", "pfi", *STUDENT, "--out", tmp_path / "r"
    )
    assert str(file) in line
    assert "checksum" in line


def test_store_lacks_tensors(capsys: pytest.CaptureFixture[str], shapes: Path, teacher: Path, tmp_path: Path) -> None:
    store = write(cache_options(shapes, teacher, method="rm"), tmp_path / "store")
    line = refused(
        capsys, 4, "distill", "--data", shapes, "--cache", store, "--method", "ld,rm", *STUDENT, "--out", tmp_path / "r"
    )
    assert "box_distribution@main+vlr" in line
    command = line.split("add them: kdcli ")[1]
    assert command == f"cache add {store} --method ld,rm"
    assert run(command.split()) == 0  # and then it trains
    fields = ["--data", shapes, "--cache", store, "--method", "ld,rm", *STUDENT, "--out", tmp_path / "r"]
    assert run(["distill", *(str(f) for f in fields)]) == 0


def test_method_that_a_model_cannot_do(
    capsys: pytest.CaptureFixture[str], shapes: Path, default_store: Path, tmp_path: Path
) -> None:
    line = refused(
        capsys, 3, "distill", "--data", shapes, "--cache", default_store, "--method", "ld",
        "--model", "retinanet_shufflenet_v2_x0_5", *SMALL, "--out", tmp_path / "r",
    )  # fmt: skip
    assert "box_distribution" in line
    retina = make_teacher(tmp_path / "retina.pt", detector="retinanet")
    line = refused(
        capsys, 3, "cache-teacher", "--data", shapes, "--teacher", retina, "--method", "ld", "--out", tmp_path / "s"
    )
    assert "box_distribution" in line


def test_unknown_names(capsys: pytest.CaptureFixture[str], shapes: Path, default_store: Path, tmp_path: Path) -> None:
    end = ["--out", tmp_path / "r"]
    start = ["distill", "--data", shapes, "--cache", default_store, "--method", "ld", *STUDENT]
    assert "--epochs" in refused(capsys, 2, "train", "--epoch", "3")
    assert "distill" in refused(capsys, 2, "distil")
    assert "did you mean 'temperature'?" in refused(capsys, 3, *start, "--set", "ld.temperatur=8", *end)
    assert "unknown table 'l'" in refused(capsys, 3, *start, "--set", "l.temperature=8", *end)
    assert "ld.temperature" in refused(capsys, 3, *start, "--set", "ld.temperature=hot", *end)
    assert "optim" in refused(capsys, 3, *start, "--set", "optim.lrr=1", *end)
    assert "did you mean 'pfi'?" in refused(capsys, 3, *[*start[:6], "pfl", *start[7:]], *end)
    assert "gfl_resnet18" in refused(
        capsys, 3, "train", "--data", shapes, "--model", "gfl_resnet19", "--canvas", "96", *end
    )
    assert "multiple of 32" in refused(
        capsys, 3, "train", "--data", shapes, "--model", "gfl_resnet18", "--canvas", "100", *end
    )
    config = tmp_path / "run.toml"
    config.write_text("epoch = 3\n")
    assert "did you mean 'epochs'?" in refused(capsys, 3, "train", "--config", config, *end)
    config.write_text("canvas = 96\n")
    assert 'canvas = 96: must be text, in quotes: "96"' in refused(capsys, 3, "train", "--config", config, *end)
    line = refused(capsys, 3, *start, "--set", "ld.vlr_gamma=-1", *end)
    assert line.endswith("vlr_gamma -1.0: must be a share from 0 to 1")
    show = ["cache", "show", default_store, "999", "--out", tmp_path / "row.png"]
    assert "no row for image 999: its data set had no such image id" in refused(capsys, 4, *show)
    assert not (tmp_path / "r").exists()


def test_full_disk_before_and_while_writing(
    capsys: pytest.CaptureFixture[str], shapes: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [
        "cache-teacher", "--data", shapes, "--teacher", teacher, "--method", "ld,rm,pfi", "--workers", "0", "--threads",
        "1", "--shard-rows", "10", "--micro-batch", "4", "--out", tmp_path / "store",
    ]  # fmt: skip
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type(usage)(usage.total, usage.total, 1000))
        line = refused(capsys, 5, *flags)
        assert "the store needs about" in line
    assert not (tmp_path / "store").exists()

    real = places.atomic_write_bytes

    def full(path: Path, data: bytes) -> None:
        if path.is_relative_to(place) and "features" in str(path) and "/c/1/" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, data)

    with monkeypatch.context() as patch:  # what is written beside the store to time the disk
        place = tmp_path
        patch.setattr(places, "atomic_write_bytes", full)
        assert "No space left on device" in refused(capsys, 5, *flags)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        place = tmp_path / "store"
        patch.setattr(places, "atomic_write_bytes", full)
        line = refused(capsys, 5, *flags)
        assert "run the same command again" in line
    assert "000001.json" not in [f.name for f in (tmp_path / "store" / "journal").iterdir()]
    assert not [f for f in (tmp_path / "store").rglob("*") if "/c/1/" in str(f) and f.is_file()]
    assert not list((tmp_path / "store").rglob(".*"))
    monkeypatch.undo()
    assert run([str(f) for f in flags]) == 0
    assert run(["cache", "verify", str(tmp_path / "store")]) == 0


def test_incomplete_store(
    capsys: pytest.CaptureFixture[str], shapes: Path, default_store: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(default_store, store)
    sorted((store / "journal").iterdir())[-1].unlink()
    line = refused(
        capsys, 4, "distill", "--data", shapes, "--cache", store, "--method", "rm", *STUDENT, "--out", tmp_path / "r"
    )
    assert "incomplete" in line
    assert "run the same cache-teacher command again" in line


def test_teacher_without_a_class(capsys: pytest.CaptureFixture[str], copy: Path, teacher: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        file = copy / "annotations" / f"{split}.json"
        content = json.loads(file.read_text())
        content["categories"][0]["name"] = "blob"
        file.write_text(json.dumps(content))
    line = refused(
        capsys, 3, "cache-teacher", "--data", copy, "--teacher", teacher, "--method", "rm", "--out", tmp_path / "s"
    )
    assert "'blob'" in line
    assert CLASSES[0] in line


def test_a_gate_stops_a_weak_teacher(
    capsys: pytest.CaptureFixture[str], shapes: Path, teacher: Path, tmp_path: Path
) -> None:
    line = refused(
        capsys, 6, "cache-teacher", "--data", shapes, "--teacher", teacher, "--method", "rm", "--min-teacher-ap", "50",
        "--out", tmp_path / "s",
    )  # fmt: skip
    assert "below --min-teacher-ap 50" in line
    assert not (tmp_path / "s").exists()


def test_store_without_an_image_of_the_run(
    capsys: pytest.CaptureFixture[str], copy: Path, teacher: Path, tmp_path: Path
) -> None:
    image = sorted((copy / "train").iterdir())[4]
    data = image.read_bytes()
    image.unlink()
    store = write(cache_options(copy, teacher, method="rm", skip_bad=True), tmp_path / "store")
    image.write_bytes(data)
    line = refused(
        capsys, 4, "distill", "--data", copy, "--cache", store, "--method", "rm", *STUDENT, "--out", tmp_path / "r"
    )
    assert "written without 1 images of this run, the first is image 5" in line
    assert not (tmp_path / "r").exists()


def test_verify_notices_a_changed_image(
    capsys: pytest.CaptureFixture[str], copy: Path, teacher: Path, tmp_path: Path
) -> None:
    store = write(cache_options(copy, teacher, method="rm"), tmp_path / "store")
    for image in (copy / "train").iterdir():
        image.write_bytes(image.read_bytes() + b"\0")
    line = refused(capsys, 4, "cache", "verify", store, "--teacher", teacher, "--data", copy)
    assert "the image file is not the one that the teacher saw" in line


def test_run_folders_are_not_overwritten(capsys: pytest.CaptureFixture[str], shapes: Path, tmp_path: Path) -> None:
    flags = ["train", "--data", str(shapes), *STUDENT, "--out", str(tmp_path / "run")]
    assert run(flags) == 0
    assert "--overwrite" in refused(capsys, 3, *flags)
    assert "epochs: 1 -> 5" in refused(capsys, 3, "train", "--resume", tmp_path / "run", "--epochs", "5")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("do not delete")
    line = refused(capsys, 3, *flags[:-1], tmp_path / "other", "--overwrite")
    assert "not a run folder" in line
    assert (tmp_path / "other" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("optim.lr=-1", "optim.lr = -1.0: must be a positive number"),
        ("optim.lr=nan", "optim.lr = nan"),
        ("optim.lr=inf", "optim.lr = inf"),
        ("optim.momentum=2", "optim.momentum = 2.0"),
        ("optim.weight_decay=-3", "optim.weight_decay = -3.0"),
        ("optim.warmup_steps=-3", "optim.warmup_steps = -3"),
        ("optim.clip=-3", "optim.clip = -3.0"),
        ("optim.ema_decay=1", "optim.ema_decay = 1.0"),
        ("train.workers=-2", "workers = -2: must be at least 0"),
        ("train.seed=-1", "seed = -1: must be at least 0"),
    ],
)
def test_values_that_would_ruin_a_run(
    capsys: pytest.CaptureFixture[str], shapes: Path, tmp_path: Path, setting: str, says: str
) -> None:
    flags = ["--data", shapes, "--model", "gfl_shufflenet_v2_x0_5", "--canvas", CANVAS]
    line = refused(capsys, 3, "train", *flags, "--set", setting, "--out", tmp_path / "r")
    assert says in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("methods = 3", "methods = 3: must be tables"),
        ("[methods]\nld = 3", "must be tables, e.g. [methods.ld]"),
        ("[methods.ldd]\ntemperature = 8.0", "[methods.ldd] is not used"),
        ("model = 3", "must be a table"),
    ],
)
def test_config_files_that_say_nothing(
    capsys: pytest.CaptureFixture[str], shapes: Path, default_store: Path, tmp_path: Path, toml: str, says: str
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(toml)
    start = ["distill", "--data", shapes, "--cache", default_store, "--method", "ld", "--canvas", CANVAS]
    assert says in refused(capsys, 3, *start, "--config", config, "--out", tmp_path / "r")


def test_runs_are_not_nested_in_a_run(capsys: pytest.CaptureFixture[str], shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    start = ["train", "--data", shapes, *STUDENT, "--out", tmp_path / "run"]
    assert "which is a run itself" in refused(capsys, 3, *start, "--seeds", "0,1")
    assert "exclude each other" in refused(capsys, 2, *start, "--seeds", "0,1", "--seed", "3")
    assert "write whole numbers" in refused(capsys, 3, *start, "--seeds", "")


def test_the_demo_deletes_nothing_that_is_not_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    (tmp_path / "precious.txt").write_text("x")
    assert "is not empty" in refused(capsys, 3, "demo", "--quick", "--out", tmp_path, "--overwrite")
    assert (tmp_path / "precious.txt").read_text() == "x"
    assert (tmp_path / "shapes").is_dir()
