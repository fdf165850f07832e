"""Text made safe to show, and numbers as a report writes them.

Names, paths and captions come from files and models of other people: control bytes, terminal sequences and
direction overrides are taken out here, once, before a renderer escapes the rest for its own format.
"""

from __future__ import annotations

import html
import math
import re

from samegrad.units import format_bytes, format_seconds

# A whole terminal sequence goes, not only its escape byte, or "[31m" would stay behind as text.
_TERMINAL_SEQUENCE = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b\n]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]")
_LINE_END = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_INVISIBLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


def clean_block(text: str) -> str:
    """``text`` without control bytes and direction overrides; lines and tabs stay, lone surrogates become U+FFFD."""
    without = _LINE_END.sub("\n", _TERMINAL_SEQUENCE.sub("", text))
    return _LONE_SURROGATE.sub("\ufffd", _INVISIBLE.sub("", without))


def clean_line(text: str) -> str:
    """``clean_block(text)`` on one line."""
    return re.sub(r"[\t\n]+", " ", clean_block(text)).strip()


def escape_line(text: str) -> str:
    """One line of ``text``, cleaned, for HTML or SVG text and attributes."""
    return html.escape(clean_line(text), quote=True)


def escape_block(text: str) -> str:
    """``text`` with its lines, cleaned, for an HTML ``<pre>``."""
    return html.escape(clean_block(text).strip("\n"), quote=True)


def format_number(value: float, *, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits; what is not finite is said in words."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    return f"{value:.{digits}g}"


def format_metric(name: str, value: float | int | str | None) -> str:
    """A metric's value; ``name`` ending in ``_bytes`` or ``_seconds`` says its unit. None is "not measured"."""
    if value is None:
        return "not measured"
    if isinstance(value, str):
        return clean_line(value)
    if math.isfinite(value):
        if name.endswith("_bytes"):
            return format_bytes(value)
        if name.endswith("_seconds"):
            return format_seconds(value)
    return str(value) if isinstance(value, int) else format_number(value, digits=6)


def format_rows(rows: int, *, of: int) -> str:
    """``"512 of 4000 rows"``, or ``"all 4000 rows"``."""
    noun = "row" if of == 1 else "rows"
    return f"all {of} {noun}" if rows == of and of > 1 else f"{rows} of {of} {noun}"


def format_percent(fraction: float) -> str:
    """``fraction`` as a percentage with the digits that still say something: ``"74 %"``, ``"0.5 %"``."""
    percent = fraction * 100
    return f"{percent:.0f} %" if abs(percent) >= 10 else f"{percent:.2g} %"


def capitalised(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
