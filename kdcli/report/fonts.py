"""Fonts for names in any script: Pillow's own font and matplotlib's draw an empty box for what they lack.

ASCII stays with the usual font. Anything else is written in DejaVu, which comes with matplotlib (Latin, Greek, Cyrillic and
more), else in a font of the machine that has every character (Chinese, Japanese, Korean), else as ``\\u4eba``.
"""

from __future__ import annotations

import functools
import unicodedata
from pathlib import Path

# parts of the names of fonts with many scripts, asked first: reading the characters of a font takes milliseconds
BROAD = ("cjk", "unifont", "fallback", "arialuni", "arial unicode", "wqy", "msyh", "yahei", "noto")

SCORE = frozenset(map(ord, "0123456789."))  # stands behind a name


def writable(text: str) -> tuple[str, str | None]:
    """``text`` as it can be drawn, and the font file that has all of it; None: the usual font."""
    if text.isascii():
        return text, None
    wanted = frozenset(ord(c) for c in text if not c.isspace() and unicodedata.category(c) != "Cf")
    usual = dejavu()
    if wanted <= characters(usual):
        return text, usual
    found = _font_with(wanted | SCORE)
    if found is not None:
        return text, found
    known = characters(usual)
    return "".join(c if ord(c) in known or c.isspace() else _escaped(c) for c in text), usual


def family_of(font: str) -> str:
    """What matplotlib calls the font of this file, which it then knows."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    font_manager.fontManager.addfont(font)
    return str(FT2Font(font).family_name)


@functools.cache
def dejavu() -> str:
    """The file of DejaVu Sans in matplotlib."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@functools.cache
def characters(font: str) -> frozenset[int]:
    """The code points that a font file has; none for a file that cannot be drawn with."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(font).get_charmap())
    except (RuntimeError, OSError):  # another's font: damaged, or of bitmaps alone
        return frozenset()


@functools.cache
def _machine_fonts() -> tuple[str, ...]:
    from matplotlib import font_manager

    fonts = sorted(font_manager.findSystemFonts())
    return tuple(sorted(fonts, key=lambda path: not any(part in Path(path).name.lower() for part in BROAD)))


@functools.cache
def _font_with(wanted: frozenset[int]) -> str | None:
    return next((font for font in _machine_fonts() if wanted <= characters(font)), None)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
