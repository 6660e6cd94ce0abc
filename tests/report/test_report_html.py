"""The HTML report loads nothing, runs nothing, escapes everything and is well formed; the PNG plots hold ink."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcli.report.compare import Comparison, compare, load_runs
from kdcli.report.html import gist, render_html, write_html
from kdcli.report.plots import plot_run, write_plots
from kdcli.report.svg import nice_ticks

MakeRun = Callable[..., Path]
_EVIL = ("<script>alert(1)</script>", '"><img src=x onerror=y>', "a & b", "$x$", "bell\x07")


@pytest.fixture
def comparison(make_run: MakeRun) -> Comparison:
    """Two groups of three seeds, one of one, an unfinished run and hostile names everywhere."""
    for seed, (base, ld) in enumerate([(40.0, 42.0), (44.0, 46.2), (48.0, 49.8)]):
        make_run(f"base-{seed}", ap=base, seed=seed, classes=_EVIL)
        folder = make_run(f"ld-{seed}", ap=ld, seed=seed, method=["ld"], classes=_EVIL, metrics={"teacher_ap": 54.0})
    make_run("one", ap=41.0, method=["./x.py:<b>M</b>"], tables={"m": {"path": "<i>$a$ $b$</i>"}})
    make_run("half <u>", finished=False, seed=7, env={"note": "<script>"})
    return compare(load_runs([folder.parent]))


def test_page_is_self_contained_and_well_formed(comparison: Comparison, tmp_path: Path) -> None:
    write_html(comparison, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page == render_html(comparison)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]
    tree = ET.fromstring(page.replace("<!DOCTYPE html>", ""))
    tags = {element.tag for element in tree.iter()}
    assert not tags & {"script", "link", "img", "iframe", "object", "image", "u", "b", "i"}
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page
    assert "@import" not in page
    attributes = {name for element in tree.iter() for name in element.attrib}
    assert not attributes & {"src", "href"}
    assert not any(name.startswith("on") for name in attributes)
    assert "prefers-color-scheme: dark" in page


def test_names_are_escaped_not_lost(comparison: Comparison) -> None:
    page = render_html(comparison)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "&quot;&gt;&lt;img src=x" in page
    assert "<img" not in page
    assert "a &amp; b" in page
    assert "half &lt;u&gt;" in page
    assert "\x07" not in page


def test_page_shows_results_curves_settings_and_environment(comparison: Comparison) -> None:
    page = render_html(comparison)
    tree = ET.fromstring(page.replace("<!DOCTYPE html>", ""))
    headings = [element.text for element in tree.iter("h2")]
    assert headings == [
        "Results", "AP", "Difference to the baseline", "Learning curves", "Settings that differ", "AP of each class",
        "Runs", "Environment",
    ]  # fmt: skip
    charts = [element for element in tree.iter("svg") if element.get("class") == "chart"]
    assert [len(list(chart.iter("rect"))) for chart in charts] == [3, 0, 0]
    assert len(list(charts[1].iter("circle"))) == 2  # differences of the two groups that are not the baseline
    assert len(list(charts[2].iter("polyline"))) == 3
    assert len(list(charts[2].iter("polygon"))) == 2
    text = "".join(tree.itertext())
    for word in ("44.0 ± 9.9", "+2.0 ± 0.5", "paired, 3 seeds", "teacher 54.0", "19.0 MB", "2.14.1", "unfinished"):
        assert word in text, word


def test_bars_have_the_length_of_their_ap(comparison: Comparison) -> None:
    tree = ET.fromstring(render_html(comparison).replace("<!DOCTYPE html>", ""))
    widths = [float(element.attrib["width"]) for element in tree.iter("rect")]
    aps = [group.ap.mean for group in comparison.students]
    assert [w / widths[0] for w in widths] == pytest.approx([ap / aps[0] for ap in aps], rel=1e-3)


def test_gist_is_honest(make_run: MakeRun, comparison: Comparison) -> None:
    assert gist(comparison).endswith("a difference of +2.0 ± 0.5 (paired, 3 seeds).")
    make_run("solo-a", ap=60.0)
    one = compare(load_runs([make_run("solo-b", ap=70.0, method=["ld"]), comparison.groups[0].runs[0].path]))
    assert "One seed cannot say" in gist(one)
    noisy = [make_run(f"n{s}", ap=ap, seed=s, method=["rm"]) for s, ap in ((0, 41.0), (1, 43.5), (2, 49.0))]
    bases = [run.path for run in comparison.groups[0].runs]
    assert "may be chance" in gist(compare(load_runs([*noisy, *bases])))
    assert "no finished run" in gist(compare([]))


def test_page_without_any_finished_run(make_run: MakeRun) -> None:
    page = render_html(compare(load_runs([make_run("half", finished=False)])))
    ET.fromstring(page.replace("<!DOCTYPE html>", ""))
    assert "unfinished" in page
    assert "There is no finished run." in page


def test_ticks_cover_the_range() -> None:
    assert nice_ticks(0, 54.3) == [0, 10, 20, 30, 40, 50, 60]
    assert nice_ticks(-0.3, 1.1) == [-0.4, -0.2, 0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    assert nice_ticks(1, 12)[0] <= 1
    assert nice_ticks(1, 12)[-1] >= 12


def test_plots_are_images(comparison: Comparison, tmp_path: Path) -> None:
    written = write_plots(comparison, tmp_path / "plots")
    plot_run(comparison.groups[1].runs[0], tmp_path / "plots" / "run.png")
    assert [path.name for path in written] == ["ap.png", "learning_curves.png"]
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["ap.png", "learning_curves.png", "run.png"]
    for path in (tmp_path / "plots").iterdir():
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert 0.005 < (pixels != 255).any(axis=2).mean() < 0.9


def test_no_plot_without_data(make_run: MakeRun, tmp_path: Path) -> None:
    assert write_plots(compare(load_runs([make_run("half", finished=False)])), tmp_path / "plots") == []
    silent = make_run("silent")
    (silent / "results.csv").unlink()
    comparison = compare(load_runs([silent]))
    assert [path.name for path in write_plots(comparison, tmp_path / "plots")] == ["ap.png"]
    plot_run(comparison.groups[0].runs[0], tmp_path / "plots" / "run.png")  # an empty picture, not an error
