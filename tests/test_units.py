"""Units: what people write is read exactly, what is ambiguous is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from samegrad.errors import UsageError
from samegrad.units import check_amount, format_bytes, format_seconds, parse_bytes, parse_share

POWERS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@given(st.integers(1, 999), st.sampled_from(sorted(POWERS)))
def test_whole_amounts_are_read_to_the_byte(amount: int, unit: str) -> None:
    assert parse_bytes(f"{amount}{unit}") == amount * POWERS[unit]
    assert parse_bytes(f" {amount} {unit.lower()} ") == amount * POWERS[unit]


@given(st.integers(1, 2**50))
@example(1070)
def test_what_is_printed_can_be_read_back_within_its_digits(amount_bytes: int) -> None:
    again = parse_bytes(format_bytes(amount_bytes))
    # Half of the last digit, and the part of a byte that is left off where it is read.
    assert abs(again - amount_bytes) <= 0.005 * amount_bytes + 1


def test_binary_and_decimal_units_differ() -> None:
    assert parse_bytes("6GiB") == 6 * 2**30
    assert parse_bytes("6GB") == 6 * 10**9
    assert parse_bytes("1.5GiB") == 3 * 2**29


@pytest.mark.parametrize("text", ["8", "8.5", " 12 "])
def test_a_bare_number_is_refused_with_both_readings(text: str) -> None:
    with pytest.raises(UsageError, match="without a unit") as caught:
        parse_bytes(text, option="--budget")
    assert f"{text.strip()}GiB" in caught.value.do and f"{text.strip()}GB" in caught.value.do
    assert caught.value.option == "--budget"


@pytest.mark.parametrize("text", ["0", "0.0", "0.0000000001", "99999999999", "8", "8.5"])
def test_what_is_suggested_for_a_bare_number_is_accepted(text: str) -> None:
    with pytest.raises(UsageError, match="without a unit") as caught:
        parse_bytes(text)
    for suggested in re.findall(r"[0-9.]+Gi?B", caught.value.do):
        assert parse_bytes(suggested) > 0


def test_an_amount_or_a_share_is_a_budget() -> None:
    for text in ("6GiB", "80%"):
        check_amount(text)
    for text in ("8", "110%", "much"):
        with pytest.raises(UsageError):
            check_amount(text)


NO_AMOUNTS = ["0GiB", "0", "-1GiB", "", "GiB", "6 gigs", "6GiB6", "1e30GiB", "1e400GiB", "0.2B", "NaNGiB"]


@pytest.mark.parametrize("text", NO_AMOUNTS)
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_bytes(text)


def test_the_largest_unit_is_still_an_amount() -> None:
    assert parse_bytes("1PiB") == 2**50


@given(st.floats(0.01, 100))
def test_shares_are_fractions(percent: float) -> None:
    share = parse_share(f"{percent:.4f}%")
    assert share is not None and abs(share - percent / 100) < 1e-6


@pytest.mark.parametrize("text", ["110%", "0%", "100.1%"])
def test_shares_outside_the_device_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_share(text)


@pytest.mark.parametrize("text", ["6GiB", "80", "-5%"])
def test_what_is_no_share_is_left_to_the_other_readers(text: str) -> None:
    assert parse_share(text) is None


@given(st.floats(1e-6, 1e6))
def test_seconds_are_printed_near_their_value_and_never_in_scientific_notation(seconds: float) -> None:
    text = format_seconds(seconds)
    assert not re.search(r"e[+-]", text)
    parts = {"µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
    read = sum(float(number) * parts[unit] for number, unit in re.findall(r"([\d.]+) (µs|ms|min|s|h)", text))
    assert abs(read - seconds) <= max(0.01 * seconds, 0.5e-6) + (30 if seconds >= 3600 else 0.5 if seconds >= 60 else 0)


def test_negative_amounts_keep_their_sign() -> None:
    assert format_bytes(-(2**30)) == "-" + format_bytes(2**30)
