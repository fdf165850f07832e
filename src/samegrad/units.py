"""Bytes and seconds as people write them; the only place that reads or formats units.

Inside samegrad every amount is a base unit (bytes, seconds). ``GiB`` is 2**30 and ``GB`` is 10**9; a number
without a unit is refused, because "8" has meant bytes, MiB and GiB in other tools.
"""

from __future__ import annotations

import math
import re

from samegrad.errors import UsageError

_UNITS = {
    "b": 1,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "pib": 2**50,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "pb": 10**15,
}  # fmt: skip
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([a-z]+)\s*", re.IGNORECASE)
_BARE = re.compile(r"\s*[0-9]+(?:\.[0-9]+)?\s*")
_SHARE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*")


def parse_bytes(text: str, *, option: str = "budget") -> int:
    """Bytes meant by ``text``: ``"6GiB"`` is 6 * 2**30, ``"6GB"`` is 6 * 10**9. Raises UsageError."""
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        bare = _BARE.fullmatch(text) is not None
        raise UsageError(
            asked=f"{option} {text!r}",
            found="a number without a unit" if bare else "not an amount of bytes",
            do=_with_unit(text.strip(), option) if bare else "write a positive number and a unit: 512MiB, 6GiB, 8GB",
            option=option,
        )
    amount = float(match[1]) * _UNITS[match[2].lower()]
    if not 1 <= amount < 2**60:
        raise UsageError(
            asked=f"{option} {text!r}",
            found=f"{amount:.3g} bytes is not a possible amount of memory",
            do="give a positive amount below 1 EiB, for example 6GiB",
            option=option,
        )
    return int(amount)


def _with_unit(number: str, option: str) -> str:
    """What to write instead of ``number``; only what would be accepted."""
    if float(number) * _UNITS["gb"] >= 1 and float(number) * _UNITS["gib"] < 2**60:
        return f"write the unit, for example {option}={number}GiB (2**30 bytes) or {number}GB (10**9 bytes)"
    return f"write a positive number and a unit, for example {option}=1GiB"


def check_amount(text: str, *, option: str = "budget") -> None:
    """Raises UsageError where ``text`` is neither an amount of bytes nor a share of a device."""
    if parse_share(text, option=option) is None:
        parse_bytes(text, option=option)


def parse_share(text: str, *, option: str = "budget") -> float | None:
    """The fraction meant by ``"80%"`` (0.8), or None when ``text`` is not a percentage. Raises UsageError."""
    match = _SHARE.fullmatch(text)
    if match is None:
        return None
    share = float(match[1]) / 100
    if not 0 < share <= 1:
        raise UsageError(
            asked=f"{option} {text!r}",
            found="a share of the device must lie above 0 % and at most at 100 %",
            do="write for example 80%",
            option=option,
        )
    return share


def format_bytes(amount_bytes: float) -> str:
    """``amount_bytes`` with three digits and a binary unit: ``"1.50 GiB"``, ``"12.3 KiB"``, ``"96 B"``."""
    sign, rest = ("-", -amount_bytes) if amount_bytes < 0 else ("", amount_bytes)
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        # 0.9995 of a unit already rounds to "1.00" of it
        if rest >= 0.9995 * size:
            value = rest / size
            return f"{sign}{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f} {unit}"
    return f"{sign}{rest:.0f} B"


def format_seconds(seconds: float) -> str:
    """``seconds`` in the unit that reads best: ``"850 µs"``, ``"12.3 ms"``, ``"4.21 s"``, ``"3 min 05 s"``."""
    # 0.9995 of a unit already rounds to one of it
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
