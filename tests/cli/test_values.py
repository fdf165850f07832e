"""One rule turns text into values, whoever wrote it."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any, Literal

import pytest

from samegrad.cli.values import Kind, Written, convert, nearest


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


def written(text: str, kind: Kind = Kind.WORD) -> Written:
    return Written(text=text, kind=kind, where="here")


def items(*words: str) -> Written:
    return Written(text="", kind=Kind.LIST, where="here", items=tuple(map(written, words)))


@pytest.mark.parametrize(
    ("given", "hint", "value"),
    [
        (written("3"), int, 3),
        (written("-3", Kind.INT), int, -3),
        (written("1_000", Kind.INT), int, 1000),
        (written("1_000"), int, 1000),
        (written("+0"), int, 0),
        (written("1e-4", Kind.FLOAT), float, 1e-4),
        (written("2", Kind.INT), float, 2.0),
        (written("12:30"), str, "12:30"),
        (written("8", Kind.INT), str, "8"),
        (written("no"), str, "no"),
        (written("true", Kind.BOOL), bool, True),
        (written("False"), bool, False),
        (written("1"), bool, True),
        (written("0", Kind.INT), bool, False),
        (written("null", Kind.NULL), int | None, None),
        (written("None"), str | None, None),
        (written("None"), Path | None, None),
        (written("6GiB"), str | None, "6GiB"),
        (written("auto"), int | Literal["auto"], "auto"),
        (written("4"), int | Literal["auto"], 4),
        (written("a/b"), Path, Path("a/b")),
        (written("BLUE"), Colour, Colour.BLUE),
        (items("3", "4"), tuple[int, ...], (3, 4)),
        (items("3", "4"), list[int], [3, 4]),
        (written("3, 4"), tuple[int, ...], (3, 4)),
        (items("3", "x"), tuple[int, str], (3, "x")),
    ],
)
def test_a_value_is_what_its_option_declares(given: Written, hint: Any, value: Any) -> None:
    found = convert(given, hint)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("given", "hint", "says"),
    [
        (written("abc"), int, "'abc' is not a whole number"),
        (written("3.0", Kind.FLOAT), int, "not a whole number"),
        (written("5", Kind.TEXT), int, "'5' (in quotes) is not a whole number"),
        (written("true", Kind.BOOL), int, "not a whole number"),
        (written(".nan", Kind.FLOAT), float, "not a finite number"),
        (written("inf"), float, "not a finite number"),
        (written("no"), bool, "not true or false"),
        (written("2", Kind.INT), bool, "not true or false"),
        (written("1", Kind.TEXT), bool, "not true or false"),
        (written("null", Kind.NULL), int, "not a whole number"),
        (written("null", Kind.NULL), str, "not text"),
        (items("1"), str, "a list is not text"),
        (written("atuo"), int | Literal["auto"], "not a whole number or 'auto'"),
        (written("float23"), Literal["float32", "float64"], "did you mean 'float32'"),
        (items("1", "x"), tuple[int, ...], "'x' is not a whole number"),
        (items("1"), tuple[int, int], "1 values where 2 are needed"),
        (written("3", Kind.INT), tuple[int, ...], "not a list of a whole number"),
        (written("x"), dict[str, int], "cannot be set"),
    ],
)
def test_what_is_not_the_declared_type_is_refused_in_words(given: Written, hint: Any, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        convert(given, hint)
    assert says in str(caught.value)


@pytest.mark.parametrize("kind", [Kind.WORD, Kind.INT])
@pytest.mark.parametrize("text", ["010", "-010", "00", "08", "0x10", "0X1f", "0o17", "0b11"])
def test_a_whole_number_is_decimal_whoever_wrote_it(text: str, kind: Kind) -> None:
    with pytest.raises(ValueError, match="decimal digits without a leading 0"):
        convert(written(text, kind), int)


def test_only_a_close_name_is_suggested() -> None:
    assert nearest("num_epoch", ["num_epochs", "patience"]) == "; did you mean 'num_epochs'?"
    assert nearest("zzz", ["num_epochs", "patience"]) == ""
