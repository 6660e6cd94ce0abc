"""How names and numbers are spelled for people, the same in the console, the HTML report and the plots."""

from __future__ import annotations

from kdcli.shown import cut, escaped

MARK = "≈"  # before the name of what approximates the paper's loss, and before the words that say how
_MISSING = "-"


def plain(text: object) -> str:
    """``text`` on one line as people may see it: control characters and direction marks written out, cut at 200 characters.

    For one name or value; a whole line is ``kdcli.shown.one_line``.
    """
    return cut(escaped(str(text)))


def spelled(value: object) -> str:
    """A setting as people write it: ``-`` for none, lists with commas, ``true`` and ``false``."""
    if value is None or value == "":
        return _MISSING
    if isinstance(value, bool):
        return str(value).lower()
    return plain(", ".join(map(str, value)) if isinstance(value, list | tuple) else value)


def number(value: float | None, digits: int = 1) -> str:
    """``42.7``, or ``-`` when there is no value."""
    return _MISSING if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 1) -> str:
    """``+2.1``, or ``-`` when there is no value."""
    return _MISSING if value is None else f"{value:+.{digits}f}"


def with_interval(value: float | None, half_width: float | None, plus: bool = False) -> str:
    """``42.7 ± 0.4``; the interval is left out when it is not known. ``plus`` writes the sign of the value."""
    shown = signed(value) if plus else number(value)
    return shown if half_width is None or value is None else f"{shown} ± {number(half_width)}"


def size(num_bytes: float | None) -> str:
    """``1.3 GB`` (decimal units)."""
    if num_bytes is None:
        return _MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 99.5 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def duration(seconds: float | None) -> str:
    """``0.4 s``, ``82 s``, ``4 min 10 s``, ``3 h 05 min``."""
    if seconds is None:
        return _MISSING
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def millions(count: float | None) -> str:
    """``4.21 M`` parameters."""
    return _MISSING if count is None else f"{count / 1e6:.2f} M"
