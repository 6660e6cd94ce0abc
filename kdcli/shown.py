"""How text from files, flags and names is shown to people: control characters escaped, long values cut, on one line.

A class or file name may hold escape sequences that set a terminal's title or clear it, and marks that reorder what stands
around them. Everything that is printed passes through here.
"""

from __future__ import annotations

import re
import unicodedata

VALUE = 200  # characters of one value
LINE = 2_000  # of one line: the longest that kdcli writes by itself, a list of settings that differ, has about 1,500
_HEAD, _TAIL = 120, 60  # what is kept of a value that is cut: a path is known by its end
# Marks that reorder or hide the text around them; joiners stay, some scripts need them.
_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff\u2028\u2029")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# what stands in quotes, blanks too, and any other run of text without a blank
_QUOTED = re.compile(rf"(?:(?<=[\s(=:\[,])|^)'(?=\S)([^']{{{VALUE + 1},}})'(?!\w)")
_RUN = re.compile(rf"\S{{{VALUE + 1},}}")


def escaped(text: str) -> str:
    """``text`` with its control characters, lone surrogates and direction marks written out: ``\\x1b``, ``\\u202e``."""
    return text if text.isprintable() else "".join(map(_escape, text))


def cut(text: str, most: int = VALUE) -> str:
    """``text`` of at most about ``most`` characters: the middle of a longer one gives way to ``…``, its length follows."""
    if len(text) <= most:
        return text
    head = most * _HEAD // VALUE
    return f"{text[:head]}…{text[len(text) - most * _TAIL // VALUE :]} ({len(text):,} characters)"


def shown(value: object) -> str:
    """A value in a message, as Python writes it, escaped and cut."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of over 4,300 digits, or lists within lists
        return f"a {type(value).__name__} that is too long to be shown"
    return cut(escaped(text))


def word_of(value: object) -> str:
    """A text as it is, and any other value as ``shown`` has it: what is to be compared with known words."""
    return value if isinstance(value, str) else shown(value)


def one_line(message: str) -> str:
    """A message for the terminal: escaped, the values in it cut, and in the end the line itself."""
    if len(message) > VALUE:
        message = _QUOTED.sub(lambda found: f"'{cut(found[1])}'", message)
        message = _RUN.sub(lambda found: cut(found[0]), message)
    return cut(escaped(message), LINE)


def _escape(character: str) -> str:
    if character in _SHORT:
        return _SHORT[character]
    if unicodedata.category(character) not in ("Cc", "Cs") and character not in _MARKS:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
