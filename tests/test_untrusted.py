"""Documents that may be of anybody: nested, long, with numbers that fit nowhere. And how text is shown."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from kdcli.limits import MAX_DEPTH, MAX_TOML
from kdcli.shown import LINE, cut, escaped, one_line, shown
from kdcli.untrusted import parse_json, parse_toml


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 500, 990, 100_000])
def test_nesting_is_refused(depth: int) -> None:
    texts = ["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth]
    for text in texts:
        with pytest.raises(ValueError, match=r"nested more than|Expecting|delimiter"):
            parse_json(text)
        with pytest.raises(ValueError, match=r"nested more than|Expecting|delimiter"):
            parse_json(text.encode())
    for toml in ("a = " + "[" * depth + "]" * depth, "a = " + "{a=" * depth, ".".join("a" * depth) + " = 1"):
        with pytest.raises(ValueError, match=r"nested more than|Invalid|Unclosed|Expected|at line 1"):
            parse_toml(toml)


def test_what_kdcli_writes_is_read() -> None:
    document = {"a": [1, -(2**63), 2**63 - 1, 0.5, None, {"b": []}]}
    assert parse_json(json.dumps(document)) == document
    assert parse_toml("a = 1\n[b.c]\nd = [[1], [2]]") == {"a": 1, "b": {"c": {"d": [[1], [2]]}}}
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)


@pytest.mark.parametrize("text", [str(2**63), str(-(2**63) - 1), "9" * 40, "9" * 5000])
def test_numbers_beyond_64_bits_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="does not fit 64 bits"):
        parse_json(f'{{"a": {text}}}')


def test_a_long_text_is_refused_unread() -> None:
    text = "#" * (MAX_TOML + 1)
    tracemalloc.start()
    with pytest.raises(ValueError, match="characters are more"):
        parse_toml(text)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_what_controls_a_terminal_is_written_out() -> None:
    assert escaped("plain, grün, 猫, a\u200db") == "plain, grün, 猫, a\u200db"
    assert (
        escaped("\x1b]0;t\x07\x9b2J\x7f\n\r\t\u202e\u2028\udcff") == r"\x1b]0;t\x07\x9b2J\x7f\n\r\t\u202e\u2028\udcff"
    )


def test_values_are_cut() -> None:
    assert cut("a" * 200) == "a" * 200
    found = cut("a" * 199 + "b" * 3_000_000)
    assert len(found) < 210
    assert found.endswith("(3,000,199 characters)")
    assert "…" in found
    assert shown(int("f" * 5000, 16)) == "a int that is too long to be shown"
    assert shown("a\nb") == r"'a\nb'"


@pytest.mark.parametrize(
    "value", ["x" * 3_000_000, "x y " * 750_000, "x'y " * 750_000, "\x1b[2J" * 750_000, "/".join(["folder"] * 400_000)]
)
def test_a_line_has_an_end_and_keeps_the_fix(value: str) -> None:
    line = one_line(f"data '{value}' is no folder; name another")
    assert len(line) < LINE + 30
    assert line.startswith("data '")
    assert "is no folder; name another" in line
    assert line.isprintable()


def test_a_usual_line_is_left_alone() -> None:
    line = "view 'a' and 'b': " + "word " * 200 + "'c d' /a/path (1,000 characters)"
    assert one_line(line) == line
