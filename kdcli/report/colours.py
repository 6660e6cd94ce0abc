"""Ten colours that people with any of the three colour blindnesses can tell apart, and the text colour to put on each.

Okabe and Ito's eight (2008, without white) with purple of Paul Tol's "bright" and indigo of his "muted" scheme: the
pair that keeps every two colours at least 16 CIELAB units apart in normal, protan, deutan and tritan vision (Machado
et al. 2009, severity 1). An eleventh colour would break that, so further classes start over and their names tell.
"""

from __future__ import annotations

Rgb = tuple[int, int, int]

PALETTE: tuple[str, ...] = (
    "#0072B2",  # blue
    "#D55E00",  # vermillion
    "#009E73",  # bluish green
    "#CC79A7",  # reddish purple
    "#E69F00",  # orange
    "#56B4E9",  # sky blue
    "#F0E442",  # yellow
    "#332288",  # indigo (Tol)
    "#AA3377",  # purple (Tol)
    "#000000",  # black
)
# Lines and bars must stand out from a white and from a near-black page, so charts use the first six and add dashes.
CHART_COLOURS = PALETTE[:6]


def colour_of(index: int) -> str:
    """``#RRGGBB`` of the class with this index (0, 1, ...)."""
    return PALETTE[index % len(PALETTE)]


def chart_colour(index: int) -> str:
    """``#RRGGBB`` of a line or bar."""
    return CHART_COLOURS[index % len(CHART_COLOURS)]


def to_rgb(colour: str) -> Rgb:
    """``#RRGGBB`` -> (red, green, blue), 0..255."""
    return (int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16))


def text_on(colour: str) -> str:
    """Black or white, whichever has the higher WCAG contrast on ``colour``: always at least 4.5 : 1."""
    return max(("#000000", "#FFFFFF"), key=lambda text: contrast(text, colour))


def contrast(first: str, second: str) -> float:
    """WCAG 2 contrast ratio of two colours, 1..21."""
    dark, light = sorted((_luminance(first), _luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    red, green, blue = (_linear(channel / 255) for channel in to_rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else float(((value + 0.055) / 1.055) ** 2.4)
