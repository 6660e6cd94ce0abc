"""Names in any script are drawn in a font that has them, or spelled out; never as empty boxes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

from kdcli.report import fonts, plots
from kdcli.report.draw import draw_detections
from kdcli.report.fonts import characters, dejavu, writable

OTHER = Path(dejavu()).with_name("STIXGeneral.ttf")  # has what DejaVu lacks: it stands in for a font of the machine


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fonts of the machine: none, until a test adds some."""
    found: list[str] = []
    monkeypatch.setattr(fonts, "_machine_fonts", lambda: tuple(found))
    fonts._font_with.cache_clear()
    return found


@pytest.fixture
def own() -> str:
    """A character that OTHER has and DejaVu lacks."""
    return chr(min(set(FT2Font(str(OTHER)).get_charmap()) - characters(dejavu())))


def test_ascii_keeps_its_font() -> None:
    assert writable("dog 0.90") == ("dog 0.90", None)


@pytest.mark.parametrize("name", ["Möwe", "собака", "σκύλος", "né́"])
def test_dejavu_has_alphabets(name: str, machine: list[str]) -> None:
    assert writable(name) == (name, dejavu())


def test_a_font_of_the_machine_is_found(own: str, machine: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    machine += [str(broken), dejavu(), str(OTHER)]
    assert writable(own) == (own, str(OTHER))


def test_what_no_font_has_is_spelled(machine: list[str]) -> None:
    assert writable("犬 dog \U0001f9ff é") == (r"\u72ac dog \U0001f9ff é", dejavu())


def _labels(monkeypatch: pytest.MonkeyPatch, names: list[str], classes: list[str]) -> list[tuple[str, object]]:
    from kdcli.report import draw

    seen: list[tuple[str, object]] = []
    label = draw._label

    def spy(
        pen: object, text: str, rect: object, colour: object, font: ImageFont.FreeTypeFont, *rest: object
    ) -> object:
        seen.append((text, font.path))
        return label(pen, text, rect, colour, font, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(draw, "_label", spy)
    boxes = np.array([[10, 40 + 60 * k, 90, 90 + 60 * k] for k in range(len(names))])
    draw_detections(np.full((320, 640, 3), 90, np.uint8), boxes, names, [0.5] * len(names), classes=classes)
    return seen[::-1]


def test_labels_take_the_font_that_has_them(monkeypatch: pytest.MonkeyPatch, own: str, machine: list[str]) -> None:
    machine.append(str(OTHER))
    names = ["dog", "собака", own + " 0.", "犬"]
    found = _labels(monkeypatch, names, ["cat", *names])
    assert [text for text, _ in found] == ["dog 0.50", "собака 0.50", f"{own} 0. 0.50", r"4 \u72ac 0.50"]
    assert [font for _, font in found[1:]] == [dejavu(), str(OTHER), dejavu()]


def test_plots_warn_of_no_missing_glyph(own: str, machine: list[str], tmp_path: Path) -> None:
    machine.append(str(OTHER))
    figure = Figure()
    axes = figure.add_subplot()
    axes.set_yticks([0, 1, 2], [plots._text(name) for name in (own, "собака ≈ $1", "犬")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots._save(figure, tmp_path / "a.png")
    assert [label.get_text() for label in axes.get_yticklabels()] == [own, r"собака ≈ \$1", r"\u72ac"]
    assert (tmp_path / "a.png").stat().st_size > 1000
