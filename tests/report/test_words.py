"""Text made safe, and numbers as a report writes them."""

from __future__ import annotations

import html
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samegrad.report.words import (
    clean_block,
    clean_line,
    escape_line,
    format_metric,
    format_number,
    format_percent,
    format_rows,
)
from samegrad.units import format_bytes, format_seconds

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@given(st.text(st.characters(), max_size=80))
def test_no_control_byte_survives_and_the_text_can_be_written(text: str) -> None:
    cleaned = clean_block(text)
    assert not CONTROL.search(cleaned)
    cleaned.encode()
    assert clean_block(cleaned) == cleaned


@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=80))
def test_harmless_text_is_left_as_it_is(text: str) -> None:
    assert clean_block(text) == text


@given(st.text(max_size=80))
def test_one_line_is_one_line(text: str) -> None:
    assert "\n" not in clean_line(text)


@given(st.text(max_size=80))
def test_escaped_text_reads_back_and_holds_nothing_active(text: str) -> None:
    escaped = escape_line(text)
    assert html.unescape(escaped) == clean_line(text)
    assert not set(escaped) & set("<>\"'")


@pytest.mark.parametrize(
    "sequence", ["\x1b[31m", "\x1b[1;38;5;9m", "\x1b]0;title\x07", "\x1b]8;;x\x1b\\", "\x9b2J", "\x1bM"]
)
def test_whole_terminal_sequences_go(sequence: str) -> None:
    assert clean_line(f"a{sequence}b") == "ab"


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n", "\u2028", "\x85"])
def test_every_kind_of_line_end_is_one(end: str) -> None:
    assert clean_block(f"a{end}b") == "a\nb"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_said_in_words(value: float) -> None:
    assert not re.search(r"\bnan\b|\binf\b", format_number(value))
    assert format_metric("m", value) == format_number(value)
    assert format_metric("m_bytes", value) == format_number(value)


def test_a_metrics_name_says_its_unit() -> None:
    assert format_metric("peak_bytes", 3 * 2**20) == format_bytes(3 * 2**20)
    assert format_metric("step_seconds", 0.25) == format_seconds(0.25)
    assert format_metric("count", 3 * 2**20) == str(3 * 2**20)
    assert format_metric("auc", None) == "not measured"


@given(st.floats(1e-5, 9.99))
def test_percentages_stay_within_their_rounding(fraction: float) -> None:
    number, unit = format_percent(fraction).split(" ")
    assert unit == "%"
    assert float(number) / 100 == pytest.approx(fraction, rel=0.055)


def test_rows_are_counted_in_words() -> None:
    assert format_rows(3, of=10) == "3 of 10 rows"
    assert format_rows(10, of=10) == "all 10 rows"
    assert format_rows(1, of=1) == "1 of 1 row"
